"""A config file alone runs no Python: the command line or Python says so, or the run has recorded it."""

import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import fedray
from fedray.cli import app
from fedray.config import plugins, trust, yaml_text
from fedray.config.run_config import RunConfig
from fedray.config.trust import IMPORTS
from fedray.errors import ConfigError
from fedray.storage.run_files import RunFiles
from fedray.sweeps.space import Sweep
from fedray.sweeps.sweep import load_sweep
from tests.experiment import tiny

CODE = """
from dataclasses import dataclass
from fedray import METHODS, Method
with open({ran!r}, "a") as mark:
    mark.write("x")
@dataclass(frozen=True, kw_only=True)
class Mine(Method):
    \"\"\"Mine.\"\"\"
    citation = "made up"
METHODS["mine"] = Mine
"""


@pytest.fixture
def files(in_tmp: Path) -> Path:
    """Write mine.py, which leaves a mark when it is run, and configs that import it; return the mark."""
    ran = in_tmp / "ran"
    (in_tmp / "mine.py").write_text(CODE.format(ran=str(ran)))
    base = tiny.TREE | {"imports": ["mine.py"], "method": {"name": "mine", "batch_size": 50}}
    (in_tmp / "x.yaml").write_text(yaml_text.dump({"base": base}))
    (in_tmp / "s.yaml").write_text(yaml_text.dump({"base": base, "space": {"seed": {"grid": [0, 1]}}}))
    return ran


def forget() -> None:
    """Forget what was imported, as a new process would."""
    from fedray.methods import METHODS

    METHODS.pop("mine", None)
    for kept in (plugins._imported, plugins._sources, plugins._beside, plugins._adopted, trust._accepted):
        kept.clear()
    sys.modules.pop("helper_of_mine", None)


def fails(*words: str) -> str:
    done = CliRunner().invoke(app, list(words))
    assert isinstance(done.exception, ConfigError), (done.output, done.exception)
    return str(done.exception)


@pytest.mark.parametrize(
    "words",
    [
        ("run", "x.yaml", "--out", "r"),
        ("run", "x.yaml", "seed=3"),
        ("run", "s.yaml"),
        ("sweep", "s.yaml", "--out", "r"),
        ("plan", "x.yaml"),
        ("plan", "s.yaml"),
        ("run", "x.yaml", "--import", "other.py"),
    ],
)
def test_a_command_runs_no_code_of_a_file_by_itself(words: tuple[str, ...], files: Path) -> None:
    Path("other.py").touch()
    said = fails(*words)
    digest = sha256(Path("mine.py").read_bytes()).hexdigest()
    assert f"{files.parent}/mine.py (SHA-256 {digest[:16]})" in said
    assert f"--import {files.parent}/mine.py" in said and "--trust" in said and "trust=True" in said
    assert not files.exists() and not Path("r").exists() and not Path("runs").exists()


def test_python_runs_no_code_of_a_file_by_itself(files: Path) -> None:
    for call in (
        lambda: fedray.run("x.yaml"),
        lambda: fedray.sweep("s.yaml"),
        lambda: RunConfig.load("x.yaml"),
        lambda: Sweep.load("s.yaml"),
    ):
        with pytest.raises(ConfigError, match="trust=True"):
            call()
    assert not files.exists()


@pytest.mark.parametrize("more", [["--trust"], ["--import", "mine.py"], ["imports=[mine.py]"]])
def test_the_command_line_may_say_so(more: list[str], files: Path) -> None:
    done = CliRunner().invoke(app, ["run", "x.yaml", "--out", "r", *more])
    assert done.exit_code == 0, done.output
    assert files.read_text() == "x"
    digest = sha256(Path("mine.py").read_bytes()).hexdigest()
    assert RunFiles(Path("r")).read_json(IMPORTS) == {str(Path("mine.py").resolve()): digest}
    forget()
    fails("run", "x.yaml", "--out", "q")  # the trust was this command's


def test_python_may_say_so(files: Path) -> None:
    assert fedray.run("x.yaml", out="r", trust=True).result["status"] == "finished"
    forget()
    assert len(Sweep.load("s.yaml", trust=True).points) == 2
    forget()
    tree: dict[str, Any] = yaml_text.load("x.yaml")["base"]
    assert fedray.run(tree, out="q").result["status"] == "finished"  # a mapping is the program's own
    assert files.read_text() == "xxx"


@pytest.fixture
def interrupted(files: Path) -> Path:
    with pytest.raises(KeyboardInterrupt):
        fedray.run("x.yaml", out="r", trust=True, on_round=tiny.ending(1, KeyboardInterrupt))
    forget()
    return files


def test_resume_knows_what_its_run_has_imported(interrupted: Path) -> None:
    assert fedray.resume("r").result["status"] == "finished"
    assert interrupted.read_text() == "xx"
    forget()
    fedray.load_model("r")
    assert fedray.load_model("r") is not None


@pytest.mark.parametrize("named", [(), ("--import", "mine.py")])
def test_resume_refuses_a_file_that_has_changed(named: tuple[str, ...], interrupted: Path) -> None:
    before = sha256(Path("mine.py").read_bytes()).hexdigest()
    Path("mine.py").write_text(Path("mine.py").read_text() + "# edited\n")
    now = sha256(Path("mine.py").read_bytes()).hexdigest()
    said = fails("resume", "r", *named)
    assert f"(SHA-256 {before[:16]} then, {now[:16]} now)" in said and "--trust" in said
    forget()
    with pytest.raises(ConfigError, match="changed since the run imported it"):
        fedray.resume("r")
    forget()
    assert CliRunner().invoke(app, ["resume", "r", "--trust"]).exit_code == 0
    assert list((RunFiles(Path("r")).read_json(IMPORTS) or {}).values()) == [now]
    forget()
    fedray.load_model("r")  # it has recorded the new one


def test_resume_notices_a_change_beside_the_file(files: Path) -> None:
    Path("helper_of_mine.py").write_text("A = 1\n")
    Path("mine.py").write_text("import helper_of_mine\n" + Path("mine.py").read_text())
    with pytest.raises(KeyboardInterrupt):
        fedray.run("x.yaml", out="r", trust=True, on_round=tiny.ending(1, KeyboardInterrupt))
    forget()
    Path("helper_of_mine.py").write_text("A = 2\n")
    with pytest.raises(ConfigError, match=r"helper_of_mine\.py \(SHA-256 .* then, .* now\)"):
        fedray.resume("r")


def test_a_run_without_a_record_needs_a_word(interrupted: Path) -> None:
    Path("r", IMPORTS).unlink()  # begun before runs recorded it
    assert "which its imports.json does not record" in fails("resume", "r")
    assert interrupted.read_text() == "x"
    done = CliRunner().invoke(app, ["resume", "r", "--import", "mine.py"])
    assert done.exit_code == 0, done.output


def test_a_copied_config_of_a_run_is_a_file_like_any_other(interrupted: Path) -> None:
    assert "a config file alone does not run" in fails("run", "r/config.yaml")
    assert interrupted.read_text() == "x"


@pytest.mark.slow
def test_a_sweep_and_its_resume(ray_local: Any, files: Path) -> None:
    made = fedray.sweep("s.yaml", out="r", trust=True)
    assert [trial.status for trial in made.trials] == ["finished", "finished"]
    forget()
    assert len(load_sweep("r").points) == 2
    forget()
    Path("mine.py").write_text(Path("mine.py").read_text() + "# edited\n")
    with pytest.raises(ConfigError, match="changed since the run imported it"):
        load_sweep("r")
    assert len(load_sweep("r", trust=True).points) == 2
