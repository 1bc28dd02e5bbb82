"""Logs of micro-federations: a log knows of which federations it is, and is of one training at a time."""

from dataclasses import asdict
from typing import Any

import pytest

from fedray.config import sealed
from fedray.errors import RunError
from fedray.storage.directory import Lock
from rllib_pruner.stages import logs
from rllib_pruner.stages.federations import Federations

ROW: dict[str, Any] = {name: 0.0 for name in logs.COLUMNS} | {"episode": 3, "stage": 0, "action": -1}


def collect(folder: Any, federations: Federations, first: int = 0) -> list[int]:
    """Collect nothing, which claims the folder all the same."""
    return list(logs.collect(folder, asdict(federations), 0, first))


def test_a_log_is_taken_up_again(tmp_path):
    for _ in range(2):
        assert collect(tmp_path / "log", Federations()) == [0]
    assert (tmp_path / "log" / logs.ORIGIN).is_file()


@pytest.mark.parametrize(
    ("federations", "first", "told"),
    [
        (
            Federations(rounds=(20, 20)),
            0,
            r"process\.federations\.rounds: \[\d+, \d+\] in the log, \[20, 20\] now",
        ),
        (
            Federations(cases=(("digits", "cnn"),)),
            0,
            r"process\.federations\.cases: \[.*\] in the log, \[\[.digits",
        ),
        (Federations(), 500, r"process\.first: 0 in the log, 500 now"),
    ],
)
def test_a_log_of_other_federations_is_refused(tmp_path, federations, first, told):
    collect(tmp_path, Federations())
    with pytest.raises(RunError, match=f"the log is of other federations: {told}"):
        collect(tmp_path, federations, first)


def test_a_log_that_does_not_say_of_what_it_is_is_refused(tmp_path):
    logs.write([ROW], tmp_path / "episodes-00000.parquet")
    with pytest.raises(RunError, match=r"an earlier version made this log.*give process\.log another folder"):
        collect(tmp_path, Federations())


def test_a_log_of_other_actions_is_refused(tmp_path, monkeypatch):
    collect(tmp_path, Federations())
    monkeypatch.setattr(logs, "ACTIONS", ("hold", "×0.5"))
    with pytest.raises(RunError, match=r'actions: ."hold", "×0.9".* in the log, ."hold", "×0.5". now'):
        collect(tmp_path, Federations())


def test_a_log_from_before_its_actions_were_written_is_taken_up_again(tmp_path):
    collect(tmp_path, Federations())
    origin = sealed.load(tmp_path / logs.ORIGIN)
    del origin["actions"]
    sealed.write(tmp_path / logs.ORIGIN, origin)
    assert collect(tmp_path, Federations()) == [0]


def test_an_edited_origin_is_refused(tmp_path):
    collect(tmp_path, Federations())
    place = tmp_path / logs.ORIGIN
    place.write_text(place.read_text().replace("first: 0", "first: 500"))
    with pytest.raises(RunError, match="it was edited, or cut"):
        collect(tmp_path, Federations(), 500)


def test_a_log_is_of_one_process_at_a_time(tmp_path):
    with Lock(tmp_path), pytest.raises(RunError, match="this collection of episodes is still running"):
        collect(tmp_path, Federations())


def test_a_damaged_shard_is_named(tmp_path):
    for name in ("episodes-00000.parquet", "episodes-00001.parquet"):
        logs.write([ROW], tmp_path / name)
    assert len(logs.load(tmp_path)) == 2
    data = bytearray((tmp_path / "episodes-00001.parquet").read_bytes())
    data[len(data) // 3] ^= 1
    (tmp_path / "episodes-00001.parquet").write_bytes(data[:-20])
    with pytest.raises(RunError, match=r"episodes-00001\.parquet: cannot be read"):
        logs.load(tmp_path)
