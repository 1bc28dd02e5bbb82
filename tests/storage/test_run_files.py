"""A run's files: no two runs share a directory, and a crash at any write leaves one to go on from."""

import json
import os
import stat
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from fedray.errors import ConfigError, RunError
from fedray.experiment.run import resume, run
from fedray.federation.server import Checkpoint
from fedray.storage.directory import check_free, numbered
from fedray.storage.run_files import RunFiles
from fedray.types import ClientRecord, Cost, Layout, Mask, Params, RoundReport, ServerState
from tests.experiment import tiny

LAYOUT = Layout(names=("w", "b"), shapes=((2, 2), (2,)), prunable=(True, False), trainable=(True, True))


def checkpoint(round: int) -> Checkpoint:
    """Return what is kept after round - 1, with that number everywhere."""
    params = Params(torch.full((LAYOUT.size,), float(round)), LAYOUT)
    return Checkpoint(ServerState(round, params, Mask.full(LAYOUT)), memories={3: {"r": torch.ones(2)}})


def report(round: int, clients: int = 2, metrics: Mapping[str, float] | None = None) -> RoundReport:
    cost = Cost(
        bytes_down=100,
        bytes_up=50 + round,
        flops=1e6,
        executed_flops=5e5,
        seconds=0.5,
        steps=27,
        energy_j=2.5,
    )
    records = [ClientRecord(k, "phone", 10 + k, "folded", cost, 1.0, 0.25 * k, 4096) for k in range(clients)]
    return RoundReport(round, {"val/accuracy": 0.5, **(metrics or {})}, tuple(records), (f"note {round}",))


def filled(path: Path, rounds: int, checkpoints: tuple[int, ...]) -> RunFiles:
    """Return the files of a run that made some rounds, and saved after some of them."""
    files = RunFiles.create(path)
    files.write_config({"rounds": rounds})
    for round in range(rounds + 1):
        files.append(report(round, clients=2 if round else 0))
        if round in checkpoints:
            files.save(checkpoint(round + 1))
    return files


# ── a directory of one's own
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_gets_a_new_directory_or_an_empty_one(tmp_path):
    assert RunFiles.create(tmp_path / "a" / "new").path == tmp_path / "a" / "new"
    (tmp_path / "empty").mkdir()
    RunFiles.create(tmp_path / "empty")
    assert tiny.listing(tmp_path) == ["a", "a/new", "a/new/checkpoints", "empty", "empty/checkpoints"]


@pytest.mark.parametrize("what", ["a run", "a file in it", "a file"])
def test_a_directory_that_holds_something_is_refused(tmp_path, what):
    path = tmp_path / "taken"
    match what:
        case "a run":
            RunFiles.create(path)
        case "a file in it":
            path.mkdir()
            (path / "thesis.tex").write_text("all of it")
        case _:
            path.write_text("all of it")
    before = tiny.listing(tmp_path)
    for refuse in (check_free, RunFiles.create):
        with pytest.raises(ConfigError, match=r"taken is not empty: .*; choose another one with --out$"):
            refuse(path)
    assert tiny.listing(tmp_path) == before


def test_a_directory_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_free(tmp_path / "file" / "run")
    with pytest.raises(
        ConfigError, match=r"file/run: cannot be made: Not a directory; choose another with --out"
    ):
        RunFiles.create(tmp_path / "file" / "run")


def test_check_free_writes_nothing(tmp_path):
    check_free(tmp_path / "a" / "b")
    assert tiny.listing(tmp_path) == []


def test_numbered_is_the_first_that_is_not_there(tmp_path):
    assert numbered(tmp_path / "runs", "fedavg") == tmp_path / "runs" / "fedavg-001"
    for name in ("fedavg-001", "fedavg-002", "fedavg-004", "snip-003"):
        (tmp_path / "runs" / name).mkdir(parents=True)
    assert numbered(tmp_path / "runs", "fedavg") == tmp_path / "runs" / "fedavg-003"
    assert numbered(tmp_path / "runs", "snip") == tmp_path / "runs" / "snip-001"
    assert not (tmp_path / "runs" / "fedavg-003").exists()


def test_of_runs_that_start_at_once_one_gets_the_directory(tmp_path, monkeypatch):
    """All have seen that it is free before the first makes it."""
    starters = 8
    barrier, won, lost = threading.Barrier(starters), list[RunFiles](), list[ConfigError]()

    def check(path: Path) -> None:
        check_free(path)
        barrier.wait()

    monkeypatch.setattr("fedray.storage.directory.check_free", check)

    def start() -> None:
        try:
            won.append(RunFiles.create(tmp_path / "run"))
        except ConfigError as error:
            lost.append(error)

    threads = [threading.Thread(target=start) for _ in range(starters)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(won), len(lost)) == (1, starters - 1)
    assert all("is another run's directory" in str(error) for error in lost)


@pytest.mark.parametrize("what", ["absent", "empty", "of something else"])
def test_what_is_not_a_run_is_not_opened(tmp_path, what):
    if what != "absent":
        (tmp_path / "there").mkdir()
    if what == "of something else":
        (tmp_path / "there" / "rounds.jsonl").write_text("{}\n")
    for use in (RunFiles.open, resume):
        with pytest.raises(ConfigError, match=r"there is not the directory of a run: it has no config\.yaml"):
            use(tmp_path / "there")


def test_a_config_of_something_else_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("services: {web: {image: nginx}}\n")
    before = tiny.listing(tmp_path)
    with pytest.raises(ConfigError, match=r"^services \(.*/config\.yaml\): unknown"):
        resume(tmp_path)
    assert tiny.listing(tmp_path) == before


# ── what is written
# ──────────────────────────────────────────────────────────────────────────────────────────


def test_a_round_is_a_line(tmp_path):
    files = filled(tmp_path / "run", 2, ())
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert len({line.pop("checksum") for line in lines}) == 3
    assert lines == files.rounds()
    assert files.rounds()[1] == {"round": 1, "metrics": {"val/accuracy": 0.5}, "notes": ["note 1"]}


def test_numbers_that_json_does_not_have_are_null(tmp_path):
    files = RunFiles.create(tmp_path / "run")
    files.append(report(0, metrics={"train/loss": float("nan"), "val/loss": float("inf")}))
    files.write_json("result.json", {"a": float("-inf"), "b": 1.5, "c": "nan", "d": 2**60})
    for name in ("rounds.jsonl", "result.json"):
        text = (tmp_path / "run" / name).read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
    assert files.rounds()[0]["metrics"] == {"val/accuracy": 0.5, "train/loss": None, "val/loss": None}
    assert files.read_json("result.json") == {"a": None, "b": 1.5, "c": "nan", "d": 2**60}
    assert files.read_json("mlflow.json") is None


def test_the_config_is_kept_as_it_was(tmp_path):
    files = RunFiles.create(tmp_path / "run")
    tree = tiny.config().to_tree()
    files.write_config(tree)
    assert RunFiles.open(tmp_path / "run").read_config() == tree
    assert list(files.read_config()) == list(tree)  # in the order of the documentation


def test_clients_are_read_by_pandas_as_one_table(tmp_path):
    files = filled(tmp_path / "run", 5, (0, 2, 5))
    folder = tmp_path / "run" / "clients.parquet"
    assert tiny.listing(folder) == ["part-000001-000002.parquet", "part-000003-000005.parquet"]
    table = pd.read_parquet(folder)
    assert table["round"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert table["client"].tolist() == [0, 1] * 5
    assert table["bytes_up"].tolist() == [51, 51, 52, 52, 53, 53, 54, 54, 55, 55]
    first = {key: value for key, value in table.iloc[1].items()}
    assert first == {
        "round": 1,
        "client": 1,
        "device": "phone",
        "num_examples": 11,
        "fate": "folded",
        "bytes_down": 100,
        "bytes_up": 51,
        "flops": 1e6,
        "executed_flops": 5e5,
        "seconds": 0.5,
        "steps": 27,
        "energy_j": 2.5,
        "memory_bytes": 4096,
        "density": 1.0,
        "loss": 0.25,
    }
    (folder / ".part-000006-000007.parquet.writing").write_bytes(b"half of")  # a crash left it
    assert len(pd.read_parquet(folder)) == 10
    files.save(checkpoint(6))  # nothing new: no part
    assert len(pd.read_parquet(folder)) == 10


def test_the_newest_two_checkpoints_are_kept(tmp_path):
    files = filled(tmp_path / "run", 4, (0, 1, 2, 3, 4))
    assert tiny.listing(tmp_path / "run" / "checkpoints") == [
        "round-000004.checkpoint",
        "round-000005.checkpoint",
    ]
    loaded = files.load()
    assert loaded is not None
    kept = loaded.checkpoint
    assert kept.state.params == checkpoint(5).state.params
    assert kept.state.mask.is_full
    assert (kept.state.round, loaded.done) == (5, 4)
    assert torch.equal(kept.memories[3]["r"], torch.ones(2))


def test_the_model_is_kept_by_name(tmp_path):
    from safetensors.torch import load_file

    params = Params(torch.arange(6.0), LAYOUT)
    path = RunFiles.create(tmp_path / "run").write_model(params)
    assert {name: tensor.tolist() for name, tensor in load_file(path).items()} == {
        "w": [[0.0, 1.0], [2.0, 3.0]],
        "b": [4.0, 5.0],
    }


def test_warnings_are_added_up(tmp_path):
    files = RunFiles.create(tmp_path / "run")
    files.warn([])
    assert not (tmp_path / "run" / "warnings.txt").exists()
    files.warn(["one", "two"])
    files.warn(["three"])
    assert (tmp_path / "run" / "warnings.txt").read_text() == "one\ntwo\nthree\n"


# ── after something went wrong
# ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kept", [1, 20, -1])
def test_a_torn_last_line_is_left_out(tmp_path, kept):
    files = filled(tmp_path / "run", 3, ())
    path = tmp_path / "run" / "rounds.jsonl"
    whole, last = path.read_text().rstrip("\n").rsplit("\n", 1)
    path.write_text(f"{whole}\n{last[:kept]}")
    assert [line["round"] for line in files.rounds()] == [0, 1, 2]


def test_a_torn_line_in_the_middle_is_an_error(tmp_path):
    files = filled(tmp_path / "run", 3, ())
    path = tmp_path / "run" / "rounds.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], *lines[2:]]))
    with pytest.raises(RunError, match=r"rounds\.jsonl, line 2: not a JSON mapping"):
        files.rounds()


def test_rewind_forgets_what_came_later(tmp_path):
    files = filled(tmp_path / "run", 6, (0, 2, 5))
    damage(tmp_path / "run", "round-000006")
    files.rewind(files.load())
    assert [line["round"] for line in files.rounds()] == [0, 1, 2]
    assert pd.read_parquet(tmp_path / "run" / "clients.parquet")["round"].tolist() == [1, 1, 2, 2]
    for round in (3, 4):  # made again: neither lost nor twice, though 6 was never written
        files.append(report(round))
    files.save(checkpoint(5))
    assert pd.read_parquet(tmp_path / "run" / "clients.parquet")["round"].tolist() == [1, 1, 2, 2, 3, 3, 4, 4]
    # the damaged one, which has a higher number, does not count among the newest two
    assert [path.stem for path in files.checkpoints()] == ["round-000005", "round-000003"]


def test_rewind_to_before_the_start_forgets_everything(tmp_path):
    files = filled(tmp_path / "run", 0, ())
    files.rewind(None)
    assert files.rounds() == []
    RunFiles.create(tmp_path / "new").rewind(None)  # there is nothing to forget


def damage(path: Path, stem: str, how: str = "torn") -> None:
    """Spoil a checkpoint."""
    file = path / "checkpoints" / f"{stem}.checkpoint"
    whole = file.read_bytes()
    middle = len(whole) // 2
    spoilt = {
        "empty": b"",
        "torn": whole[:400],
        "foreign": b"broken\n",
        "longer": whole + b"\0",
        "first bit": bytes([whole[0] ^ 1]) + whole[1:],
        "last bit": whole[:-1] + bytes([whole[-1] ^ 128]),
        "middle bit": whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :],
    }
    file.write_bytes(spoilt[how])


DAMAGES = ["empty", "torn", "foreign", "longer", "first bit", "last bit", "middle bit"]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path, how):
    files = filled(tmp_path / "run", 4, (2, 4))
    damage(tmp_path / "run", "round-000005", how)
    before = tiny.listing(tmp_path / "run")
    loaded = files.load()
    assert loaded is not None
    assert loaded.done == 2
    assert tiny.listing(tmp_path / "run") == before  # reading changes nothing
    files.rewind(loaded)
    warnings = (tmp_path / "run" / "warnings.txt").read_text()
    assert "round-000005.checkpoint could not be used" in warnings
    assert (tmp_path / "run" / "checkpoints" / "unusable-round-000005.checkpoint").is_file()


@pytest.mark.parametrize("how", DAMAGES)
def test_without_a_sound_checkpoint_nothing_is_lost(tmp_path, how):
    files = filled(tmp_path / "run", 4, (2, 4))
    for stem in ("round-000003", "round-000005"):
        damage(tmp_path / "run", stem, how)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(
        RunError, match=r"(?s)cannot be resumed.*round-000005.*is damaged.*round-000003.*is damaged"
    ):
        files.load()
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_before_the_first_checkpoint_there_is_none(tmp_path):
    assert RunFiles.create(tmp_path / "new").load() is None
    assert filled(tmp_path / "run", 0, ()).load() is None  # it died between the set-up and its checkpoint


def test_rounds_without_any_checkpoint_are_not_thrown_away(tmp_path):
    files = filled(tmp_path / "run", 3, ())
    with pytest.raises(RunError, match=r"checkpoints is empty, but rounds\.jsonl has rounds"):
        files.load()


def test_a_checkpoint_of_an_earlier_version_is_refused(tmp_path):
    files = filled(tmp_path / "run", 1, ())
    for name in ("round-000002.pt", "round-000002.checkpoint"):
        torch.save({"round": 3}, tmp_path / "run" / "checkpoints" / name)
        with pytest.raises(
            RunError, match=r"round-000002\S*: was written by fedray 0\.1\.0 in a format that"
        ):
            files.load()


@pytest.mark.parametrize("gone", [1, 3, 4])
def test_a_checkpoint_beyond_the_rounds_is_not_used(tmp_path, gone):
    files = filled(tmp_path / "run", 4, (2, 4))
    path = tmp_path / "run" / "rounds.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:gone] + lines[gone + 1 :]))
    if gone == 1:
        with pytest.raises(RunError, match=r"rounds\.jsonl, line 2: is damaged, or the line before it is"):
            files.load()
        return
    found = files.load()
    assert found is not None
    assert found.done == 2


# ── a crash at any write
# ──────────────────────────────────────────────────────────────────────────────────────────


class Crash(BaseException):
    """The machine has died; nothing catches this."""


class Disk:
    """Counts what a run writes below a folder, and dies at one of the writes, which it leaves half done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, dies_at: int | None = None) -> None:
        self.folder, self.dies_at, self.writes = str(folder), dies_at, 0
        for name in ("replace", "rename", "unlink", "mkdir"):
            self._watch(monkeypatch, Path, name, 0)
        fsync = os.fsync

        def synced(file: int) -> None:
            # of what is written, the end is lost that was not synced yet
            if stat.S_ISREG(os.fstat(file).st_mode):
                self._count(lambda: os.ftruncate(file, max(0, os.fstat(file).st_size - 10)))
            fsync(file)

        monkeypatch.setattr(os, "fsync", synced)

    def _watch(
        self,
        monkeypatch: pytest.MonkeyPatch,
        owner: Any,
        name: str,
        path: int,
        half_done: Callable[..., Any] | None = None,
    ) -> None:
        original = getattr(owner, name)

        def watched(*args: Any, **options: Any) -> Any:
            if str(args[path]).startswith(self.folder):
                self._count(lambda: half_done(*args) if half_done else None)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, watched)

    def _count(self, half_done: Callable[[], Any]) -> None:
        self.writes += 1
        if self.dies_at is not None and self.writes >= self.dies_at:
            if self.writes == self.dies_at:
                half_done()
            raise Crash(f"at write {self.writes}")


CONFIG = tiny.config({"method": {"name": "staged", "density": 0.3, "stages": 2}, "clients.dropout": 0.2})
"""The mask moves after rounds 1 and 2: the state is more than the weights."""
WRITES = 33
"""Of such a run; the crash is tried at each."""


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run comes to that nothing happens to."""
    path = tmp_path_factory.mktemp("reference") / "run"
    run(CONFIG, out=path)
    return tiny.figures(path)


def test_all_writes_of_a_run_are_watched(tmp_path, monkeypatch, reference):
    disk = Disk(monkeypatch, tmp_path)
    run(CONFIG, out=tmp_path / "run")
    assert disk.writes == WRITES
    assert tiny.figures(tmp_path / "run") == reference


@pytest.mark.parametrize("write", range(1, WRITES + 1))
def test_a_crash_at_any_write_leaves_a_run_to_go_on_from(tmp_path, reference, write):
    out = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patched, pytest.raises(Crash):
        Disk(patched, tmp_path, dies_at=write)
        run(CONFIG, out=out)
    if not (out / "config.yaml").exists():  # it had not begun
        with pytest.raises(ConfigError, match="is not the directory of a run"):
            resume(out)
        return
    files = RunFiles.open(out)
    rounds = [line["round"] for line in files.rounds()]
    assert rounds == list(range(len(rounds)))
    if (out / "clients.parquet").exists() and any((out / "clients.parquet").glob("part-*")):
        assert len(pd.read_parquet(out / "clients.parquet"))
    history = resume(out)
    assert tiny.figures(out) == reference
    assert history.weights_sha256 == reference["model"]
    assert not [name for name in tiny.listing(out) if name.endswith(".writing")]


@pytest.mark.parametrize("writes", [13, 17, 24])
def test_a_run_that_dies_again_and_again_gets_there(tmp_path, reference, writes):
    out, attempts = tmp_path / "run", 0
    while not (out / "result.json").exists():
        attempts += 1
        assert attempts < 12, "it does not get on"
        with pytest.MonkeyPatch.context() as patched:
            Disk(patched, tmp_path, dies_at=writes)
            try:
                resume(out) if (out / "config.yaml").exists() else run(CONFIG, out=out)
            except Crash:
                continue
    assert attempts > 1
    assert tiny.figures(out) == reference
