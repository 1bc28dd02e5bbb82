"""The floors of the house, read from the source: who may import whom, and what only when it is needed.

__main__ → cli → rllib_pruner → fedray → sweeps → experiment → tracking → overview → publishing → storage →
report → config → methods → policies → federation → training → pruning · costs · models · data →
the ground floor
"""

import ast
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
# `fedray` stands for fedray/__init__.py, the public names
FLOORS = (
    {"types", "errors", "randomness", "comparing", "shares"},
    {"durable"},
    {"parquet", "records"},
    {"pruning", "costs", "models", "data"},
    {"training"},
    {"federation"},
    {"policies"},
    {"methods"},
    {"config"},
    {"report"},
    {"storage"},
    {"publishing"},
    {"overview"},
    {"tracking"},
    {"experiment"},
    {"sweeps"},
    {"fedray"},
    {"rllib_pruner"},
    {"cli"},
    {"__main__"},
)
FLOOR = {part: height for height, parts in enumerate(FLOORS) for part in parts}
RAY = {
    "fedray.federation.pool",
    "fedray.federation.crew",
    "fedray.federation.works",
    "fedray.federation.actor",
    "fedray.experiment.cluster",
    "fedray.experiment.reaching",
    "fedray.experiment.room",
    "fedray.sweeps.sweep",
    "fedray.sweeps.trial",
    "fedray.sweeps.tune",
    "fedray.sweeps.hyperband",
    "fedray.sweeps.pbt",
    "fedray.sweeps.searchers",  # Tune's wrappers of Optuna and HyperOpt
    "fedray.sweeps.suggester",
    "fedray.sweeps.reports",
    "fedray.sweeps.schedulers",
    "fedray.sweeps.drawing",  # the verbs of a sweep's space are Tune's own
}
HEAVY = {"torchvision", "sklearn", "matplotlib", "mlflow", "pyarrow", "ray", "pandas"}
TYPE_CHECKING = {"TYPE_CHECKING", "typing.TYPE_CHECKING"}
NOT_A_NAME = {"utils", "common", "core", "base", "manager"}


class Import(NamedTuple):
    """One imported name: `lazy` inside a function, `typing` under TYPE_CHECKING."""

    target: str
    lazy: bool = False
    typing: bool = False


def imports(node: ast.AST, package: str, lazy: bool = False, typing: bool = False) -> Iterator[Import]:
    """Yield every import below a node; `from a import b` is `a.b`, whether b is a module or not."""
    if isinstance(node, ast.Import):
        yield from (Import(name.name, lazy, typing) for name in node.names)
    elif isinstance(node, ast.ImportFrom):
        module = resolve_name("." * node.level + (node.module or ""), package)
        yield from (Import(f"{module}.{name.name}", lazy, typing) for name in node.names)
    else:
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        guarded = isinstance(node, ast.If) and ast.unparse(node.test) in TYPE_CHECKING
        for child in ast.iter_child_nodes(node):
            in_guard = guarded and isinstance(node, ast.If) and child in node.body
            yield from imports(child, package, lazy, typing or in_guard)


def part_of(name: str) -> str | None:
    """Return which part of the house a dotted name belongs to, or None if it is not ours."""
    top, _, rest = name.partition(".")
    inner = rest.partition(".")[0]
    if top == "fedray":
        return inner if inner in FLOOR else "fedray"
    return top if top == "rllib_pruner" else None


def faults(module: str, source: str, is_package: bool = False) -> list[str]:
    """Return what is wrong with the imports of a module; is_package if it is an __init__.py."""
    here, package = part_of(module), module if is_package else module.rpartition(".")[0]
    assert here is not None
    found = []
    for target, lazy, typing in imports(ast.parse(source), package):
        there, top = part_of(target), target.partition(".")[0]
        if there is not None and there != here and FLOOR[there] >= FLOOR[here]:
            found.append(f"{module} imports {target}, which is not on a lower floor")
        if there == here == "methods" and not is_package:
            found.append(f"{module} imports {target}, another method")
        if top == "ray" and not typing and module not in RAY and here != "rllib_pruner":
            found.append(f"{module} imports {target}; ray belongs to {', '.join(sorted(RAY))}")
        if top in HEAVY and not (lazy or typing) and FLOOR[here] <= FLOOR["methods"]:
            found.append(f"{module} imports {target} when it is loaded; import it where it is used")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted((*ROOT.glob("fedray/**/*.py"), *ROOT.glob("rllib_pruner/**/*.py"))):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def test_every_module_imports_only_what_its_floor_may():
    found = [
        fault
        for name, path in modules()
        for fault in faults(name, path.read_text(encoding="utf-8"), path.name == "__init__.py")
    ]
    assert not found, "\n".join(found)


def test_every_part_of_the_package_has_its_floor():
    placed = {part for part in FLOOR if part not in ("fedray", "rllib_pruner")}
    assert {name.split(".")[1] for name, _ in modules() if name.startswith("fedray.")} == placed


def test_no_file_imports_itself_by_way_of_others():
    names = {name for name, _ in modules()}
    graph: dict[str, set[str]] = {}
    for name, path in modules():
        package = name if path.name == "__init__.py" else name.rpartition(".")[0]
        targets = imports(ast.parse(path.read_text(encoding="utf-8")), package)
        found = {owner(target, names) for target, lazy, typing in targets if not (lazy or typing)}
        graph[name] = found - {None, name, "fedray"}  # type: ignore[assignment]
    assert tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


def owner(target: str, names: set[str]) -> str | None:
    """Return the module of ours that a dotted name belongs to."""
    while target and target not in names:
        target = target.rpartition(".")[0]
    return target or None


def test_no_room_is_too_large():
    lines: Counter[str] = Counter()
    for name, path in modules():
        parts = path.relative_to(ROOT).parts
        room = "/".join(parts[:-1]) if len(parts) > 2 else name
        lines[room] += len(path.read_text(encoding="utf-8").splitlines())
    total = lines.total()
    assert not {room: f"{count / total:.0%}" for room, count in lines.items() if count > 0.15 * total}


def test_every_file_is_named_after_what_it_holds():
    paths = [path for folder in ("fedray", "rllib_pruner", "tests") for path in (ROOT / folder).rglob("*")]
    assert not [path for path in paths if path.stem in NOT_A_NAME]


@pytest.mark.parametrize(
    "code, unwanted",
    [
        ("import fedray, fedray.cli", HEAVY | {"torch"}),
        ("import rllib_pruner.train, rllib_pruner.evaluate", HEAVY | {"torch"}),
        (
            "import fedray, fedray.federation.worker; [getattr(fedray, name) for name in fedray.__all__]",
            HEAVY,
        ),
        (
            "import fedray.report.table, fedray.report.figures, fedray.report.reading",
            {"torch", "ray", "mlflow", "sklearn", "torchvision"},
        ),
    ],
    ids=["the command line", "the commands of agents", "all public names and a worker", "reports"],
)
def test_importing_loads_nothing_heavy(code: str, unwanted: set[str]):
    code += f"; import sys; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.split() == []


BAD = {
    "is not on a lower floor": [
        ("fedray.costs.flops", "from fedray.federation.client import Client"),
        ("fedray.costs.flops", "from fedray import federation"),
        ("fedray.costs.flops", "from ..federation import client"),
        ("fedray.costs.flops", "from fedray.models import ModelSpec"),
        ("fedray.types", "from fedray.errors import MethodError"),
        ("fedray.types", "if TYPE_CHECKING:\n    from fedray.models import ModelSpec"),
        ("fedray.data.files", "def f():\n    from fedray.methods import METHODS"),
        ("fedray.federation.server", "class A:\n    import fedray.experiment.run"),
        ("fedray.federation.pool", "import fedray"),
        ("fedray.experiment.run", "from fedray import DATASETS"),
        ("fedray.experiment.run", "import numpy, rllib_pruner.train as train"),
        ("rllib_pruner.train", "def f():\n    import fedray.cli"),
        ("fedray.report.table", "from fedray.experiment.run import run"),
        ("fedray.pruning.masks", "from fedray.policies.stages import ACTIONS"),
    ],
    "another method": [
        ("fedray.methods.frlp", "from fedray.methods.fedavg import FedAvg"),
        ("fedray.methods.frlp", "from .fedavg import FedAvg"),
        ("fedray.methods.frlp", "from fedray.methods import METHODS"),
    ],
    "ray belongs to": [
        ("fedray.federation.server", "import ray"),
        ("fedray.experiment.run", "def f():\n    import ray"),
        ("fedray.report.table", "async def f():\n    from ray import tune"),
        ("fedray.data.files", "if TYPE_CHECKING:\n    pass\nelse:\n    from ray import get"),
        ("fedray.data.files", "if not TYPE_CHECKING:\n    import ray.data"),
    ],
    "when it is loaded": [
        ("fedray.federation.pool", "try:\n    import ray\nexcept ImportError:\n    pass"),
        ("fedray.models.vgg", "from torchvision.models.vgg import cfgs"),
        ("fedray.data.datasets", "class A:\n    import sklearn.datasets"),
        ("fedray.types", "import pandas as pd"),
    ],
}


@pytest.mark.parametrize(
    "fault, module, source", [(fault, *case) for fault, cases in BAD.items() for case in cases]
)
def test_a_forbidden_import_is_seen(fault: str, module: str, source: str):
    assert any(fault in found for found in faults(module, source))


@pytest.mark.parametrize(
    "module, source",
    [
        ("fedray.federation.pool", "from fedray.pruning.masks import top_k\nimport fedray.costs.codec"),
        ("fedray.federation.pool", "def f():\n    import ray\n    import rayon"),
        ("fedray.federation.pool", "if TYPE_CHECKING:\n    from ray import ObjectRef"),
        (
            "fedray.federation.worker",
            "import typing\nif typing.TYPE_CHECKING:\n    from ray import ObjectRef",
        ),
        ("fedray.errors", "from types import ModuleType\nfrom data import models"),
        ("fedray.data.datasets", "from fedray.data.files import cache\nfrom .files import download"),
        ("fedray.models.vgg", "def f():\n    return lambda: __import__\nimport torch, numpy.typing"),
        ("fedray.report.figures", "from matplotlib.figure import Figure"),
        ("fedray.cli.running", "from fedray import __version__\nfrom fedray.experiment.run import run"),
        (
            "rllib_pruner.train",
            "import ray\nfrom fedray import RunConfig\nfrom rllib_pruner.rate_search.env import Env",
        ),
    ],
)
def test_an_allowed_import_is_left_alone(module: str, source: str):
    assert faults(module, source) == []


def test_the_table_of_methods_may_import_them_all():
    source = "from fedray.methods.fedavg import FedAvg\nfrom .frlp import FRLP"
    assert faults("fedray.methods", source, is_package=True) == []
