"""Files from outside the package: what lies beside them, and what a run remembers of them."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config import plugins, yaml_text
from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError, FedrayError
from fedray.methods import METHODS
from tests.experiment import tiny

METHOD = """
from dataclasses import dataclass, replace
from fedray.federation.method import Method
from fedray.methods import METHODS

@dataclass(frozen=True)
class Memory:
    rounds: int = 0

@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    '''FedAvg that counts.'''
    more: int = {more}

    def setup(self, state, ctx):
        return replace(state, memory=Memory())

    def prune(self, state, cohort, ctx):
        return replace(state, memory=Memory(state.memory.rounds + 1))

METHODS["mine"] = Mine
"""
B = "rounds=2, model='mlp', data={'name': 'digits'}, clients={'population': 10, 'cohort': 3, 'actors': 0}, "
B += "tracking={'uri': 'none'}, checkpoint_every=1"
STOPPED = f"""
import fedray, sys
class Enough(Exception): pass
def stop(report):
    if report.round == 1: raise Enough
if __name__ == "__main__":
    try: fedray.run(fedray.RunConfig({B}, method={{'name': 'mine'}}), out='r', on_round=stop)
    except Enough: pass
"""


RECORDS: tuple[dict[Any, Any], ...] = (plugins._imported, plugins._beside, plugins._adopted)


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own, in a folder."""
    path = os.pathsep.join([str(Path(fedray.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


# ── what lies beside a file
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_file_may_import_what_lies_beside_it(in_tmp):
    (in_tmp / "here").mkdir()
    (in_tmp / "here" / "my_helpers.py").write_text("MORE = 4\nfrom my_other import LATER\n")
    (in_tmp / "here" / "my_other.py").write_text("LATER = 5\n")
    text = METHOD.format(more="my_helpers.MORE")
    (in_tmp / "here" / "mine.py").write_text(f"import my_helpers\n{text}")
    config = RunConfig(imports=["here/mine.py"], method={"name": "mine"})
    assert config.method.options.more == 4  # type: ignore[attr-defined]
    names = {module.__name__ for module in plugins.imported_modules()}
    assert {"my_helpers", "my_other"} < names  # workers get them by value too
    assert config.imports == (in_tmp / "here" / "mine.py",)


def test_a_file_in_a_package_may_import_its_neighbours(in_tmp):
    (in_tmp / "my_package" / "inner").mkdir(parents=True)
    for place in ("my_package", "my_package/inner"):
        (in_tmp / place / "__init__.py").touch()
    (in_tmp / "my_package" / "numbers_of_mine.py").write_text("MORE = 6\n")
    text = METHOD.format(more="MORE")
    (in_tmp / "my_package" / "inner" / "mine.py").write_text(f"from ..numbers_of_mine import MORE\n{text}")
    config = RunConfig(imports=["my_package/inner/mine.py"], method={"name": "mine"})
    assert config.method.options.more == 6  # type: ignore[attr-defined]
    assert type(config.method.options).__module__ == "my_package.inner.mine"


def test_two_helpers_of_one_name_are_refused(in_tmp):
    for folder, number in (("a", 1), ("b", 2)):
        (in_tmp / folder).mkdir()
        (in_tmp / folder / "my_helpers.py").write_text(f"MORE = {number}\n")
        (in_tmp / folder / f"{folder}.py").write_text("from my_helpers import MORE\n")
    plugins.import_modules(["a/a.py"])
    with pytest.raises(
        ConfigError, match=r"^imports: b/b\.py imports my_helpers, .* finds .*/a/my_helpers\.py"
    ):
        plugins.import_modules(["b/b.py"])


def test_what_is_installed_is_neither_hidden_nor_hides(in_tmp):
    (in_tmp / "yaml.py").write_text("raise RuntimeError\n")
    (in_tmp / "random.py").write_text("raise RuntimeError\n")
    (in_tmp / "one.py").write_text("import yaml\n")
    with pytest.raises(
        ConfigError, match=r"^imports: one\.py imports yaml, which lies in its folder, but Python finds"
    ):
        plugins.import_modules(["one.py"])
    (in_tmp / "two.py").write_text("import random\nassert random.random\n")
    plugins.import_modules(["two.py"])  # of the standard library


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def", "raised SyntaxError"),
        ("1 / 0", "raised ZeroDivisionError"),
        ("import no_such", "No module named"),
    ],
)
def test_a_file_that_raises_is_named(in_tmp, text, message):
    (in_tmp / "mine.py").write_text(text)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=rf"^imports: mine\.py raised .*|{message}"):
        plugins.import_modules(["mine.py"])
    assert not [name for name in set(sys.modules) - before if name.startswith("fedray_import_mine")]


# ── what a run remembers
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_module_that_python_imported_is_recorded(in_tmp, monkeypatch):
    (in_tmp / "my_methods.py").write_text(METHOD.format(more=3))
    monkeypatch.syspath_prepend(in_tmp)
    import my_methods  # type: ignore[import-not-found]

    config = RunConfig(method={"name": "mine"})
    assert config.imports == (in_tmp / "my_methods.py",)
    assert RunConfig.from_tree(config.to_tree()) == config
    assert METHODS["mine"] is my_methods.Mine  # and is not imported a second time
    assert config.override(seed=1).imports == config.imports
    assert RunConfig().imports == ()


def forget(*names: str) -> None:
    """Be as a new process: what was imported is not there."""
    METHODS.pop("mine", None)
    for kept in RECORDS:
        kept.clear()
    for name in names:
        del sys.modules[name]


class Enough(Exception):
    """Ends a run after its first round."""


def stop(report: Any) -> None:
    """Raise after round 1."""
    if report.round == 1:
        raise Enough


@pytest.mark.parametrize("by_name", [False, True])
def test_a_run_of_it_is_resumed_where_nothing_is_imported(in_tmp, monkeypatch, by_name):
    (in_tmp / "my_methods.py").write_text(METHOD.format(more=3))
    (in_tmp / "elsewhere").mkdir()
    change = {"method": {"name": "mine"}, "rounds": 2, "checkpoint_every": 1}
    with monkeypatch.context() as patch:
        patch.syspath_prepend(in_tmp)
        import_module("my_methods")
        with pytest.raises(Enough):
            fedray.run(tiny.config(change), out="r", on_round=stop)
        assert yaml_text.load(in_tmp / "r" / "config.yaml")["imports"] == [str(in_tmp / "my_methods.py")]
        forget("my_methods")
        if by_name:
            import_module("my_methods")
    monkeypatch.chdir("elsewhere")
    assert fedray.resume("../r").result["status"] == "finished"
    assert (METHODS["mine"].__module__ == "my_methods") == by_name


def test_a_run_by_path_is_resumed_where_python_has_imported_the_file(in_tmp, monkeypatch):
    (in_tmp / "my_methods.py").write_text(METHOD.format(more=3))
    change = {"method": {"name": "mine"}, "rounds": 2, "checkpoint_every": 1, "imports": ["my_methods.py"]}
    with pytest.raises(Enough):
        fedray.run(tiny.config(change), out="r", on_round=stop)
    forget(METHODS["mine"].__module__)
    monkeypatch.syspath_prepend(in_tmp)
    import_module("my_methods")
    assert fedray.resume("r").result["status"] == "finished"


def test_a_script_of_its_own_cannot_be_recorded_and_is_named(in_tmp):
    (in_tmp / "script.py").write_text(METHOD.format(more=3) + STOPPED)
    assert python(in_tmp, "script.py").returncode == 0
    assert yaml_text.load(in_tmp / "r" / "config.yaml")["imports"] == []
    before = tiny.listing(in_tmp / "r")
    with pytest.raises(ConfigError) as caught:
        fedray.resume("r")
    assert "method.name 'mine' was added by the module __main__ (" in str(caught.value)
    assert "fedray resume --import FILE" in str(caught.value)
    assert tiny.listing(in_tmp / "r") == before
    # the script itself is such a file
    plugins.import_modules(["script.py"])
    with pytest.raises(FedrayError, match="the class Memory of the module __main__ is not there"):
        fedray.resume("r")
