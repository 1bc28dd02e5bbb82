"""The wheel carries configs and examples; what the README shows works in an empty folder."""

import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import zipfile
from pathlib import Path
from urllib.request import urlopen

import pytest

from fedray.config import shipped, yaml_text
from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.sweeps.space import Sweep
from tests.test_readme import ROOT, commands

SMALL = ["rounds=1", "model=mlp", "tracking.uri=none", "clients.actors=0"]


def test_a_shipped_config_is_found_where_there_is_no_such_file(in_tmp, caplog):
    shipped._say.cache_clear()
    wanted = RunConfig.load(ROOT / "tune_configs" / "quickstart.yaml")
    assert RunConfig.load("tune_configs/quickstart.yaml") == wanted
    assert RunConfig.load("tune_configs/quickstart.yaml") == wanted
    (line,) = caplog.messages
    assert line.startswith("no tune_configs/quickstart.yaml here: using the one that comes with fedray; ")
    (in_tmp / "tune_configs").mkdir()
    (in_tmp / "tune_configs" / "quickstart.yaml").write_text("rounds: 7\n")
    assert RunConfig.load("tune_configs/quickstart.yaml").rounds == 7


@pytest.mark.parametrize(
    "name", ["quickstart.yaml", "other/quickstart.yaml", "a/tune_configs/quickstart.yaml"]
)
def test_other_names_are_not_replaced_but_the_message_knows_them(in_tmp, name):
    with pytest.raises(
        ConfigError, match=rf"^{name}: cannot be read: .*; `?fedray comes with tune_configs/qui"
    ):
        yaml_text.load(name)
    with pytest.raises(ConfigError, match=r"cannot be read: No such file or directory$"):
        yaml_text.load("tune_configs/nope.yaml")


def test_every_template_is_described_and_loads_where_it_is_written(in_tmp):
    known = shipped.templates()
    assert set(known) == {path.stem for path in (ROOT / "tune_configs").glob("*.yaml")}
    for name, path in known.items():
        assert len(shipped.summary(path)) > 20, name
        config, schema = shipped.write_template(in_tmp / name, name)
        text = config.read_text(encoding="utf-8")
        assert "tune_configs/" not in text and f" {name}.yaml" in text
        assert f"$schema={schema.name}\n" in text and schema.is_file()
    assert len(Sweep.load(in_tmp / "quickstart" / "quickstart.yaml").points) == 4


def test_what_new_refuses(in_tmp):
    (in_tmp / "full").mkdir()
    (in_tmp / "full" / "mine.txt").write_text("mine")
    with pytest.raises(
        ConfigError, match=r"^--template: unknown template 'quikstart'; did you mean 'quickst"
    ):
        shipped.write_template(in_tmp / "a", "quikstart")
    with pytest.raises(ConfigError, match=r"full is not empty: `fedray new` needs an empty or new folder"):
        shipped.write_template(in_tmp / "full", "quickstart")
    with pytest.raises(ConfigError, match=r"mine\.txt is a file: `fedray new` needs"):
        shipped.write_template(in_tmp / "full" / "mine.txt", "quickstart")
    assert [path.name for path in in_tmp.rglob("*")] == ["full", "mine.txt"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """An environment with the wheel, and the libraries of this one."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is not installed")
    place = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "fedray/shipped/tune_configs/quickstart.yaml" in names and "fedray/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    env = place / "env"
    subprocess.run([uv, "venv", "-q", "--python", sys.executable, str(env)], check=True)
    python = env / "bin" / "python"
    subprocess.run([uv, "pip", "install", "-q", "--no-deps", "--python", str(python), str(wheel)], check=True)
    (site,) = env.glob("lib/python*/site-packages")
    (site / "libraries.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Path(env, "bin", "fedray")


def call(fedray: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(fedray), *words]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_the_readmes_commands_work_from_a_wheel_in_an_empty_folder(installed, tmp_path):
    shown = [shlex.split(line)[1:] for line in commands(ROOT / "README.md")]
    runs = [words for words in shown if words[0] == "run"]
    assert len(runs) >= 2 and any("--import" in words for words in runs)
    for number, words in enumerate(runs):
        done = call(installed, tmp_path, *words, *SMALL, "--out", f"r{number}")
        assert done.returncode == 0, done.stderr
        assert "using the one that comes with fedray" in done.stderr
        assert (tmp_path / f"r{number}" / "result.json").is_file()
        assert call(installed, tmp_path, "resume", f"r{number}", "clients.actors=0").returncode == 0


@pytest.mark.slow
def test_a_new_config_is_swept_where_it_is_written(installed, tmp_path):
    done = call(installed, tmp_path, "new", "mine")
    assert done.returncode == 0 and "cd mine && fedray sweep quickstart.yaml" in done.stdout
    swept = call(installed, tmp_path / "mine", "sweep", "quickstart.yaml", *SMALL, "method.name=fedavg")
    assert swept.returncode == 0, swept.stderr
    assert (tmp_path / "mine" / "runs" / "quickstart-001" / "best.yaml").is_file()


LINES = re.compile(r"^(fedray [^#\n]*?)\s*(?:#.*)?$", re.MULTILINE)
"""The lines of the README's blocks: `fedray runs | compare A B | …` stands for several commands."""

SWEEP = "runs/quickstart-001"
SMALLER = ["rounds=4", "eval_every=2", "clients.population=20"]
GIVEN = {
    "resume": ["resume", SWEEP],
    "plan": ["plan", "tune_configs/quickstart.yaml", "rounds=3"],
    "new": ["new", "mine"],
    "sweep": ["sweep", "tune_configs/pruning_threshold.yaml", "data.name=digits", "model=mlp"],
}
"""Command → the words that stand for the README's DIR and FILE, and for data that has to be downloaded."""
ELSEWHERE = ("run", "watch", "stop", "agent", "evaluate", "judge")
"""Commands of the tests above, and those that need a run in progress or a training of minutes."""


def lines_of_the_readme() -> list[list[str]]:
    """Return the words after `fedray` of each command that the README's blocks show."""
    found = []
    for line in LINES.findall((ROOT / "README.md").read_text(encoding="utf-8")):
        for part in line.removeprefix("fedray ").split(" | "):
            found.append(shlex.split(part))
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_line_of_the_readme_works_from_a_wheel_in_an_empty_folder(installed, tmp_path):
    """The sweep with which the README begins, smaller; then its lines, with the sweep's directory."""
    first = call(installed, tmp_path, "sweep", "tune_configs/quickstart.yaml", *SMALLER)
    assert first.returncode == 0, first.stderr
    assert f"{SWEEP}/report" in first.stdout and "Best val/accuracy" in first.stdout
    trials = [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.glob(f"{SWEEP}/trials/*"))]
    given = GIVEN | {"compare": ["compare", *trials[:2]]}
    given["sweep"] = [*GIVEN["sweep"], *SMALLER, "tune.grace_rounds=2"]
    shown = [words for words in lines_of_the_readme() if words[0] not in ELSEWHERE]
    for words in [*(given.get(words[0], words) for words in shown), ["sync", SWEEP]]:
        if words[0] == "ui":
            check_ui(installed, tmp_path, words[1])
            continue
        done = call(installed, tmp_path, *words)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (words, done.stderr)
        assert done.stdout.strip(), words
    assert {"ui", "report", "resume", "runs", "compare", "plan", "new", "methods", "devices"} <= {
        words[0] for words in shown
    }
    assert (tmp_path / SWEEP / "report" / "table.csv").is_file()


def check_ui(fedray: Path, folder: Path, directory: str) -> None:
    """Start `fedray ui`, read the page that it names, and end it as Ctrl-C does."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [str(fedray), "ui", directory, "--port", str(port)]
    process = subprocess.Popen(command, cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert f"http://127.0.0.1:{port}/#/compare-runs" in process.stdout.readline()
        until = time.monotonic() + 120
        while True:
            try:
                with urlopen(f"http://127.0.0.1:{port}/", timeout=5) as page:
                    assert b"MLflow" in page.read()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < until
                time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0
