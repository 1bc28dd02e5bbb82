"""Virtual environments of the peers: made once from pinned versions, kept in the user's cache."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
REASONS = ("error", "failed", "no ", "×", "╰─")
"""What a line of an installer's output has that tells why."""


class NotInstalledError(Exception):
    """A peer's environment cannot be made; the message is the reason, in one line."""


def cache() -> Path:
    """Return the default folder of the environments, in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "fedray" / "peers"


def python_of(requirements: Path, folder: Path) -> Path:
    """Return the Python of an environment with these requirements; make it if it is not there yet.

    Args:
        requirements: file of pinned versions; its stem names the environment.
        folder: holds all environments.

    Raises:
        NotInstalledError: if it cannot be made.
    """
    place = folder / requirements.stem
    python = place / "bin" / "python"
    digest = hashlib.sha256(requirements.read_bytes() + sys.version.encode()).hexdigest()
    made = place / ".made_from"
    if python.exists() and made.exists() and made.read_text(encoding="ascii") == digest:
        return python
    print(f"installing {requirements.stem} into {place}", flush=True)
    shutil.rmtree(place, ignore_errors=True)
    _run([sys.executable, "-m", "venv", *(("--without-pip",) if _uv() else ()), str(place)])
    _run([*_installer(python), "-r", str(requirements)])
    made.write_text(digest, encoding="ascii")
    return python


def _uv() -> str | None:
    beside = Path(sys.executable).parent
    return shutil.which("uv", path=f"{beside}{os.pathsep}{os.environ.get('PATH', '')}")


def _installer(python: Path) -> list[str]:
    """Return the command that installs into an environment: uv where it is present, else pip."""
    if uv := _uv():
        return [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", str(python)]
    return [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise NotInstalledError(str(error)) from error
    if done.returncode:
        lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        telling = [line for line in lines if any(word in line.lower() for word in REASONS)]
        raise NotInstalledError((telling or lines or [f"{command[0]} exits with {done.returncode}"])[0])
