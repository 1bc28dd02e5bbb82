"""The commands of docs/cluster/README.md for one's own machines, run on two raylets of this one.

`python -m pytest -m slow -s tests/test_walk.py` shows them with what they print.
"""

import os
import re
import socket
import subprocess
import tempfile
from pathlib import Path
from shutil import rmtree

import pytest

from tests.experiment import tiny
from tests.test_cluster import ROOT, kill_holders

PAGE = ROOT / "docs" / "cluster" / "README.md"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds its processes by /proc"),
]


def blocks() -> list[str]:
    """Return the commands of the page, block by block."""
    return re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S)


def test_the_commands_of_the_page_work() -> None:
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="fr"))  # short: sockets' paths end at 107 characters
    with socket.socket() as s:
        s.bind(("0.0.0.0", 0))
        port = s.getsockname()[1]
    head = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True).stdout.split()[0]
    strangers = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")
    env = {name: value for name, value in os.environ.items() if name not in strangers} | {
        "HOME": str(folder),
        "HEAD": head,
        "SHARED": str(folder / "shared"),
        "RAY_TMPDIR": str(folder),
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(ROOT),
    }
    env.setdefault("FEDRAY_DATA", str(Path.home() / ".cache" / "fedray"))
    (folder / "shared").mkdir()
    profile = ""

    def shell(block: str) -> str:
        """Run a block in a shell that has read the profile; two nodes of one machine need other ports."""
        text = block.replace(":6379", f":{port}").replace("--port=6379", f"--port={port}")
        extra = "--min-worker-port=0 --max-worker-port=0 --object-store-memory=100000000 --num-cpus=2"
        text = re.sub(r"^(ray start .*)$", rf"\1 {extra}", text, flags=re.M)
        text = re.sub(r"^(ray start --head)", r"\1 --include-dashboard=false", text, flags=re.M)
        with open(folder / "said.txt", "w+", encoding="utf-8") as said:  # daemons would keep a pipe open
            done = subprocess.run(
                ["bash", "-ec", profile + text], env=env, cwd=ROOT, stdout=said, stderr=said, timeout=300
            )
            said.seek(0)
            out = said.read()
        assert done.returncode == 0, f"{text}\n{out}"
        print(*(f"$ {line}" for line in block.splitlines()), out, sep="\n")  # noqa: T201
        return out

    token, on_head, on_worker, work = blocks()
    try:
        shell(token)
        file = folder / ".ray" / "auth_token"
        assert file.stat().st_mode & 0o777 == 0o600
        shell(on_head)
        shell(on_worker)
        profile = "export RAY_AUTH_MODE=token\n"
        said = shell(work)
        assert "4.0 CPU" in said and "16.0 client_host" in said, said
        assert "finished" in said
        for run in ("first/trials/*", "second"):
            assert list((folder / "shared").glob(f"{run}/result.json")), tiny.listing(folder / "shared")
        # without the token, nothing is told
        (folder / ".ray" / "auth_token").write_text("f" * 32, encoding="utf-8")
        done = subprocess.run(
            [
                "bash",
                "-c",
                f"RAY_AUTH_MODE=token fedray run tune_configs/quickstart.yaml --address {head}:{port}",
            ],
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=60,
        )
        print(f"with another token: {done.stderr}")  # noqa: T201
        assert done.returncode == 1 and "refuses our token" in done.stderr
    finally:
        kill_holders(folder, "HOME")
        rmtree(folder, ignore_errors=True)
