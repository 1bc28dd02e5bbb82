"""Files that survive: whole or not at all, what the disk refused is said, and a path is a path."""

import errno
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from fedray import durable
from fedray.durable import local_path, on_disk
from fedray.errors import ConfigError, RunError
from fedray.experiment.run import resume, run
from fedray.report.reading import find_runs, load_run
from fedray.report.table import write_report
from fedray.storage.run_files import RunFiles
from tests.experiment import tiny


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """Let the system refuse whatever makes a file larger, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_file_that_cannot_be_replaced_is_as_before(tmp_path):
    path = tmp_path / "a"
    durable.replace(path, b"before")
    with files_of_at_most(1000), pytest.raises(OSError, match="File too large"):
        durable.replace(path, bytes(2000))
    assert (path.read_bytes(), tiny.listing(tmp_path)) == (b"before", ["a"])


@pytest.mark.parametrize("name", [".result.json", "checkpoints/.round-000009.checkpoint", "checkpoints/.x"])
def test_a_resumed_run_removes_what_a_dead_process_half_wrote(tmp_path, name):
    path = tmp_path / "run"
    run(tiny.config(rounds=2), out=path)
    before = tiny.listing(path)
    (path / "result.json").unlink()
    (path / f"{name}.writing").write_bytes(b"half of")
    resume(path)
    assert tiny.listing(path) == before


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (errno.ENOSPC, "No space left on device; free space, then do it again"),
        (errno.EDQUOT, "Disk quota exceeded; free space, then do it again"),
        (errno.EACCES, "Permission denied; give yourself the right to write there, then do it again"),
        (errno.EIO, "Input/output error; do it again"),
    ],
)
def test_what_the_disk_refused_is_said(number, told):
    with pytest.raises(RunError) as caught, on_disk(Path("/x/y"), "do it again"):
        raise OSError(number, os.strerror(number))
    assert str(caught.value) == f"/x/y: cannot be written: {told}"


@pytest.mark.parametrize("size", [500, 3000, 12_000])
def test_a_run_on_a_full_disk_says_so_and_stays_resumable(tmp_path, size):
    """At the config, at the clients' rows, at a checkpoint."""
    out = tmp_path / "run"
    with files_of_at_most(size), pytest.raises(RunError) as caught:
        run(tiny.config(), out=out)
    assert f"cannot be written: File too large; free space, then `fedray resume {out}`" in str(caught.value)
    assert str(out) in str(caught.value).split(": cannot")[0]
    if (out / "config.yaml").exists():
        assert resume(out).weights_sha256 == run(tiny.config(), out=tmp_path / "whole").weights_sha256
        assert tiny.figures(out) == tiny.figures(tmp_path / "whole")


@pytest.mark.parametrize(
    "name", ["rounds.jsonl", "result.json", "model.safetensors", "client_accuracy.parquet"]
)
def test_each_file_that_the_disk_refuses_is_named(tmp_path, monkeypatch, name):
    out, real = tmp_path / "run", open

    def full(path: Any, *args: Any, **options: Any) -> Any:
        if name in str(path) and not str(path).endswith(name + "x") and "r" not in (args or ("r",))[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(path, *args, **options)

    with (
        monkeypatch.context() as patched,
        pytest.raises(RunError, match=rf"{name}: cannot be written: No space"),
    ):
        patched.setattr("builtins.open", full)
        run(tiny.config(), out=out)
    assert resume(out).result["status"] == "finished"


def test_a_damaged_part_of_the_clients_rows_is_set_aside_and_told(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(checkpoint_every=1), out=out, on_round=tiny.ending(2, KeyboardInterrupt))
    part = out / "clients.parquet" / "part-000001-000001.parquet"
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2])
    with pytest.raises(RunError, match=r"part-000001-000001\.parquet: cannot be read"):
        assert load_run(out).clients is None
    resume(out)
    told = (out / "warnings.txt").read_text()
    assert "the clients' rows of rounds 1 to 1 are lost: " in told
    clients = load_run(out).clients
    assert clients is not None
    assert sorted(set(clients["round"])) == [2, 3]


# ── paths
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", ["~/x", "exp-17:57:01", "file:x", "s3:run", "a b/ü"])
def test_a_path_is_a_path(in_tmp, monkeypatch, given):
    monkeypatch.setenv("HOME", str(in_tmp / "home"))
    path = in_tmp / "home" / "x" if given == "~/x" else in_tmp / given
    with pytest.raises(KeyboardInterrupt):
        run(tiny.config(), out=given, on_round=tiny.ending(2, KeyboardInterrupt))
    history = resume(given)
    assert history.path == path
    assert (path / "result.json").is_file()
    assert not (in_tmp / "~").exists()
    assert load_run(given).finished
    assert len(load_run(given).clients) > 0  # type: ignore[arg-type]
    assert find_runs([given]) == [path]
    assert write_report([given]).path == path / "report"
    assert RunFiles.open(given).path == path


@pytest.mark.parametrize("given", ["", "a\0b", "~nobody_of_that_name/x"])
def test_what_is_no_path_is_refused(in_tmp, given):
    for use in (local_path, resume, load_run, lambda path: run(tiny.config(), out=path)):
        with pytest.raises(ConfigError, match="is not a path"):
            use(given)
    assert tiny.listing(in_tmp) == []


def test_a_name_that_is_too_long_is_refused(in_tmp):
    with pytest.raises(ConfigError, match="cannot be made: File name too long; choose another with --out"):
        run(tiny.config(), out="x" * 300)
    assert tiny.listing(in_tmp) == []
