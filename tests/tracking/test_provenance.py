"""What is recorded beside a run's numbers."""

import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from fedray.tracking import provenance
from fedray.tracking.provenance import git_revision, run_tags


def test_tags_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"method": "frlp", "dataset": "mnist", "model": "cnn"}
    expected = {**given, "config_digest": "0123456789ab", "fedray_version": metadata.version("fedray")}
    monkeypatch.setattr(provenance, "git_revision", lambda: None)
    assert run_tags(**given, digest="0123456789ab") == expected
    monkeypatch.setattr(provenance, "git_revision", lambda: "f" * 40)
    assert run_tags(**given, digest="0123456789ab") == {**expected, "git_revision": "f" * 40}


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_git_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        ).stdout.strip()

    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "package.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.chdir(tmp_path)
    assert git_revision() is None
    git("init", "-q")
    assert git_revision() is None  # no commit yet
    (tmp_path / "package.py").write_text("1")
    git("add", "."), git("commit", "-qm", "x"), git("tag", "v1")
    commit = git("rev-parse", "HEAD")
    assert git_revision() == commit
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "untracked").write_text("1")
    assert git_revision() == commit
    (tmp_path / "package.py").write_text("2")
    assert git_revision() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", "")
    assert git_revision() is None
