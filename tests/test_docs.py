"""What the docs name is there: files, dotted names, config keys and commands."""

import importlib
import re
import shlex
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, cast

import pytest
import typer

from fedray.cli import app
from fedray.config.trees import CHOICES
from fedray.costs.differences import CODECS
from fedray.data import PARTITIONS
from fedray.federation.sampling import SAMPLERS
from fedray.methods import METHODS

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/**/*.md")),
]
FOLDERS = (ROOT, ROOT / "fedray", ROOT / "docs", ROOT / "tests")
"""Where a relative path in the docs may begin."""

FILE = re.compile(r"^[\w.-]+(/[\w.-]+)*\.(py|md|ya?ml|toml|png|cff|lock|jsonl?|parquet|safetensors|txt)$")
DOTTED = re.compile(r"^(fedray|rllib_pruner|benchmarks|tests)(\.\w+)+(\(.*\))?$")
KEY = re.compile(r"^(data|clients|method|tracking|tune)(\.\w+)+(?==|$)")
RUN_FILES = {
    "config.yaml",
    "sweep.yaml",
    "best.yaml",
    "best.json",
    "pareto.json",
    "points.jsonl",
    "spent.json",
    "judged.jsonl",
    "perturbed.jsonl",
    "lineage.jsonl",
    "mlflow-sent.jsonl",
    "rounds.jsonl",
    "published.json",
    "manifest.json",
    "imports.json",
    "data.json",
    "made_by.json",
    "stopped.json",
    "error.txt",
    "progress.jsonl",
    "clients.parquet",
    "client_accuracy.parquet",
    "model.safetensors",
    "result.json",
    "mlflow.json",
    "warnings.txt",
    "client_errors.txt",
    "chaos.jsonl",
    "decisions.png",
    "curve.png",
    "table.md",
    "policy.json",
}
"""Files that a run, a sweep, a training or a report writes."""

UPSTREAM = {"device_util.py"}
"""Files of the papers' published code."""


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each `code span` outside of fenced blocks."""
    fenced = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            for match in re.finditer(r"(?<!`)`([^`]+)`(?!`)", line):
                yield number, match[1]


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """Yield line number and text of each fenced block of a language; "" for blocks that name none."""
    text = page.read_text(encoding="utf-8")
    for match in re.finditer(r"^```(\w*)\n(.*?)^```$", text, flags=re.M | re.S):
        if match[1] == language:
            yield text[: match.start()].count("\n") + 2, match[2]


@cache
def commands() -> dict[str, Any]:
    """Return the commands of `fedray` by name, those of groups as `group name`."""

    def walk(command: Any, name: str) -> Iterator[tuple[str, Any]]:
        if hasattr(command, "list_commands"):
            for key in command.list_commands(None):
                yield from walk(command.get_command(None, key), f"{name} {key}".strip())
        else:
            yield name, command

    return dict(walk(typer.main.get_command(app), ""))


def problem_of_file(text: str) -> str | None:
    if Path(text).name in RUN_FILES | UPSTREAM or any((folder / text).exists() for folder in FOLDERS):
        return None
    if "/" not in text and any(ROOT.glob(f"**/{text}")):
        return None
    return f"no file {text}"


def problem_of_name(text: str) -> str | None:
    parts = text.partition("(")[0].split(".")
    for split in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:split]))
        except ImportError:
            continue
        for part in parts[split:]:
            known = part in getattr(found, "__dataclass_fields__", {}) or hasattr(found, part)
            if not known:
                return f"no name {text}: {'.'.join(parts[:split])} has no {part}"
            found = getattr(found, part, found)
        return None
    return f"no module of {text}"


@cache
def keys() -> frozenset[str]:
    """Return every dotted key that a config, a sweep or a training may have."""
    from pydantic import BaseModel

    from fedray.config.run_config import RunConfig
    from fedray.config.schedulers import SCHEDULERS
    from fedray.config.searches import SEARCHES
    from fedray.config.tune_config import TuneConfig
    from rllib_pruner.config import TrainConfig

    def walk(model: type[BaseModel], above: str) -> Iterator[str]:
        for name, field in model.model_fields.items():
            yield f"{above}{name}"
            inner = field.annotation
            if isinstance(inner, type) and issubclass(inner, BaseModel) and inner is not model:
                yield from walk(inner, f"{above}{name}.")

    found = {*walk(RunConfig, ""), *walk(TuneConfig, "tune."), *walk(TrainConfig, "")}
    found |= {f"{section}.{key}" for section, key in CHOICES.items()}
    found |= {"tune.scheduler.name", "tune.search.name"}
    tables: dict[str, Any] = {
        "clients.sampler": SAMPLERS,
        "clients.uplink": CODECS,
        "tune.scheduler": SCHEDULERS,
        "tune.search": SEARCHES,
    }
    for section, table in tables.items():
        found |= {f"{section}.{field.name}" for kind in table.values() for field in fields(cast(Any, kind))}
    found |= {f"method.{field.name}" for method in METHODS.values() for field in fields(method)}
    found |= {
        f"data.partition.{field.name}" for kind in PARTITIONS.values() for field in fields(cast(Any, kind))
    }
    return frozenset(found)


def problem_of_key(text: str) -> str | None:
    match = KEY.match(text)
    assert match is not None
    key = match[0]
    open_section = key.startswith(("clients.devices.", "clients.resources."))
    return None if key in keys() or open_section else f"no config key {key}"


def problem_of_command(text: str) -> str | None:
    """Say what is wrong with a `fedray …`, `python -m …` or `make …`, if anything is."""
    try:
        words = shlex.split(text, comments=True)
    except ValueError:
        return None
    words = [word for word in words if not re.match(r"^[A-Z_]+=", word)]
    if words[:2] == ["python", "-m"] and len(words) > 2:
        module = words[2]
        return None if module == "pytest" or importlib.util.find_spec(module) else f"no module {module}"
    if words[:1] == ["make"] and len(words) > 1:
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M)
        return None if words[1] in targets else f"no target of make: {words[1]}"
    if words[:1] == ["fedray"] and len(words) > 1 and re.match(r"^[a-z]", words[1]):
        return problem_of_fedray(words[1:])
    return None


def problem_of_fedray(words: list[str]) -> str | None:
    name = next((n for n in (" ".join(words[:2]), words[0]) if n in commands()), None)
    if name is None:
        groups = {known.split(" ")[0] for known in commands() if " " in known}
        return None if words == [words[0]] and words[0] in groups else f"no command: fedray {words[0]}"
    options = {option for p in commands()[name].params for option in (*p.opts, *p.secondary_opts)}
    wrong = [word for word in words if re.match(r"^--?[a-z]", word) and word.partition("=")[0] not in options]
    return f"fedray {name} has no option {wrong[0]}" if wrong else None


def problem(text: str) -> str | None:
    """Return what is wrong with a code span, or None."""
    if "<" in text or ("…" in text and not text.startswith(("fedray ", "python ", "make "))):
        return None
    if FILE.match(text) and not text.startswith("x."):
        return problem_of_file(text)
    if DOTTED.match(text):
        return problem_of_name(text)
    if KEY.match(text):
        return problem_of_key(text)
    return problem_of_command(text)


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_what_a_page_names_is_there(page: Path):
    if page.name == "CHANGELOG.md":  # an old entry names what has gone since
        return
    found = [f"line {n}: {wrong}" for n, text in spans(page) if (wrong := problem(text))]
    for start, block in [*blocks(page, ""), *blocks(page, "bash"), *blocks(page, "sh")]:
        joined = re.sub(r" *\\\n\s*", " ", block)
        found += [
            f"line {start + number}: {wrong}"
            for number, line in enumerate(joined.splitlines())
            if (wrong := problem_of_command(line.strip().removeprefix("$ ")))
        ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "fedray/nowhere.py",
        "experiment/nowhere.py",
        "nowhere.yaml",
        "fedray.nowhere",
        "fedray.types.Nothing",
        "fedray.federation.method.Method.lrr",
        "method.densty",
        "method.densty=0.1",
        "data.partition.alfa",
        "clients.cohorts",
        "tune.metrics",
        "fedray runss x.yaml",
        "fedray run x.yaml --outt y",
        "python -m rllib_pruner.trains",
        "fedray agent trains x.yaml",
        "fedray agent train --resum x",
        "make tests",
    ],
)
def test_what_is_not_there_is_found(text: str):
    assert problem(text)


@pytest.mark.parametrize(
    "text",
    [
        "fedray/types.py",
        "federation/server.py",
        "config.yaml",
        "fedray.types.Mask.density",
        "fedray.run(config)",
        "method.density=0.1",
        "data.partition.alpha",
        "clients.devices.phone",
        "fedray sweep x.yaml seed=1 --out y",
        "fedray report DIR --target 0.85",
        "python -m benchmarks.round",
        "fedray agent",
        "fedray agent train --resume runs/x",
        "make test-all",
        "weights_sha256",
        "docs/methods/<name>.md",
    ],
)
def test_what_is_there_is_not_complained_about(text: str):
    assert problem(text) is None


def test_the_tree_of_the_architecture_names_every_module():
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    tree = text.partition("## The tree")[2].partition("## One round")[0]
    modules = [*ROOT.glob("fedray/**/*.py"), *ROOT.glob("rllib_pruner/**/*.py")]
    names = {path.stem for path in modules} - {"__init__"}
    assert {name for name in names if not re.search(rf"\b{name}\b", tree)} == set()
