"""No library sends anything: no process of a run or a sweep asks for an address beyond loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fedray.config import yaml_text
from tests.experiment import tiny

HOOK = """
import sys

def seen(event, arguments):
    if event not in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        return
    target = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments[0]
    with open({log!r}, "a") as log:
        log.write(f"{{event}} {{target!r}} {{sys.argv[:3]}}\\n")

sys.addaudithook(seen)
with open({log!r}, "a") as log:
    log.write("process\\n")
"""
"""Python runs it as `sitecustomize` in every process that inherits the environment."""

SWITCHES = ("TELEMETRY", "USAGE_STATS", "DO_NOT_TRACK", "WANDB")
"""Parts of names of variables that switch telemetry off: those of this machine are left out."""

LOOPBACK = ("127.0.0.1", "localhost", "::1", "/", "None")


def is_beyond(line: str) -> bool:
    """Tell whether a line of the log names an address beyond loopback; a name of a socket file is none."""
    return line != "process" and not any(f"'{name}" in line or f" {name} " in line for name in LOOPBACK)


@pytest.mark.parametrize(
    "kind",
    ["run", pytest.param("actors", marks=pytest.mark.slow), pytest.param("sweep", marks=pytest.mark.slow)],
)
def test_nothing_is_asked_beyond_loopback(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "asked"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    tree = tiny.TREE | {"tracking": {"uri": "sqlite:///m.db"}}
    tree = tree | {"clients": tree["clients"] | {"actors": 0 if kind == "run" else 1}}
    space = {"space": {"seed": {"grid": [0, 1]}}} if kind == "sweep" else {}
    (tmp_path / "x.yaml").write_text(yaml_text.dump({"base": tree} | space))
    kept = {name: value for name, value in os.environ.items() if not any(part in name for part in SWITCHES)}
    path = os.pathsep.join([str(tmp_path / "site"), *sys.path])
    command = "sweep" if kind == "sweep" else "run"
    done = subprocess.run(
        [sys.executable, "-m", "fedray", command, "x.yaml", "--out", "r"],
        cwd=tmp_path,
        env=kept | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = log.read_text().splitlines()
    assert lines.count("process") >= (1 if kind == "run" else 3)
    assert not [line for line in lines if is_beyond(line)]


def test_the_hook_sees_what_it_must(tmp_path: Path) -> None:
    log = tmp_path / "asked"
    (tmp_path / "sitecustomize.py").write_text(HOOK.format(log=str(log)))
    code = (
        "import socket, urllib.request\n"
        "for target in ('http://192.0.2.1:9/', 'http://telemetry.invalid/'):\n"
        "    try: urllib.request.urlopen(target, timeout=0.2)\n    except OSError: pass\n"
    )
    subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(tmp_path)}, timeout=60, check=True)
    beyond = [line for line in log.read_text().splitlines() if is_beyond(line)]
    assert any("192.0.2.1" in line for line in beyond)
    assert any("telemetry.invalid" in line for line in beyond)
