"""TensorBoard and Weights & Biases beside MLflow: real files, read back."""

import json
import struct
from collections import Counter
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

import fedray
from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.tracking.also import Beside
from fedray.types import RoundReport
from tests.experiment import tiny


def events(folder: Path) -> Iterator[Any]:
    """Read TensorBoard's event files: length, its checksum, the message, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            yield Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    found = [
        ((value.tag, event.step), value.simple_value)
        for event in events(folder)
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    ]
    assert max(Counter(key for key, _ in found).values()) == 1
    return dict(found)


def expected(path: Path) -> dict[tuple[str, int], float]:
    lines = [json.loads(line) for line in (path / "rounds.jsonl").read_text().splitlines()]
    return {
        (name, line["round"]): value
        for line in lines
        for name, value in line["metrics"].items()
        if value is not None
    }


def config(*also: str) -> RunConfig:
    return tiny.config({"tracking.also": list(also)})


def test_tensorboard_has_each_point_once_also_of_a_resumed_run(in_tmp: Path) -> None:
    with pytest.raises(RuntimeError):
        fedray.run(config("tensorboard"), out="r", on_round=tiny.ending(2, RuntimeError))
    seen = scalars(in_tmp / "r" / "tensorboard")
    assert seen.keys() == expected(in_tmp / "r").keys()
    fedray.resume("r")
    seen = scalars(in_tmp / "r" / "tensorboard")
    points = expected(in_tmp / "r")
    assert points.keys() < seen.keys()
    assert all(seen[key] == pytest.approx(value, rel=1e-6) for key, value in points.items())
    last = json.loads((in_tmp / "r" / "result.json").read_text())
    assert seen["test/accuracy", tiny.ROUNDS] == pytest.approx(last["test/accuracy"], rel=1e-6)


def test_other_trackers_change_no_result_and_no_digest(in_tmp: Path) -> None:
    plain, more = tiny.config(), config("tensorboard")
    assert plain.digest == more.digest
    assert fedray.run(plain, out="a").weights_sha256 == fedray.run(more, out="b").weights_sha256


def test_a_tracker_that_fails_is_a_warning(in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedray.tracking.tensorboard import TensorBoard

    def broken(self: TensorBoard, report: RoundReport) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(TensorBoard, "log_round", broken)
    history = fedray.run(config("tensorboard"), out="r")
    assert history.result["status"] == "finished"
    assert (in_tmp / "r" / "warnings.txt").read_text().splitlines() == [
        "tensorboard gets no more of this run: OSError: No space left on device"
    ]


def test_an_empty_one_does_nothing(tmp_path: Path) -> None:
    beside = Beside((), tmp_path, {}, ())
    beside.log_round(RoundReport(1, {"a": 1.0}))
    beside.finish("FINISHED", None, {})
    assert not list(tmp_path.iterdir()) and beside.warnings == []


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["tensorbord"], "tensorboard"),
        (["tensorboard", "tensorboard"], "names a tracker twice"),
        ("wandb", "tracking.also"),
    ],
)
def test_bad_names_are_refused(given: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        tiny.config({"tracking.also": given})


def test_a_missing_package_is_refused_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedray.config.run_config.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb is not installed: pip install 'fedray\[wandb\]'"):
        config("wandb")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_weights_and_biases_offline(in_tmp: Path) -> None:
    with pytest.raises(RuntimeError):
        fedray.run(config("wandb"), out="r", on_round=tiny.ending(2, RuntimeError))
    (first,) = (in_tmp / "r" / "wandb").glob("wandb/offline-run-*")
    fedray.resume("r")
    (folder,) = (in_tmp / "r" / "wandb").glob("wandb/offline-run-*")
    assert folder.name.rpartition("-")[2] == first.name.rpartition("-")[2]
    assert not (in_tmp / "r" / "warnings.txt").exists()
    steps = logged(next(folder.glob("*.wandb")))
    assert sorted(steps) == list(range(tiny.ROUNDS + 1))


def logged(path: Path) -> list[int]:
    """Return the step of each row of history in a file of W&B: a header, then blocks as LevelDB's."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, parts, steps = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = Record.FromString(parts)
            parts = b""
            if record.WhichOneof("record_type") == "history":
                steps.append(record.history.step.num)
    return steps
