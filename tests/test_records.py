"""JSON files of a known shape: what another program wrote is refused by its name, with what to do."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedray.durable import append_lines, as_mapping
from fedray.errors import ConfigError, RunError
from fedray.experiment.forking import lineage
from fedray.experiment.resuming import resumed_config
from fedray.experiment.run import run
from fedray.publishing.manifest import MANIFEST
from fedray.publishing.manifest import read as read_manifest
from fedray.publishing.publisher import Known
from fedray.records import Record, Records, Shape, is_a
from fedray.report.address import tracked_runs
from fedray.report.reading import TRACKED, store_of
from fedray.storage.run_files import RunFiles
from fedray.sweeps.outcome import STOP_RECORD
from fedray.sweeps.perturbing import fork_if_due
from fedray.sweeps.stopping import Budget
from fedray.sweeps.suggesting import search_ended
from fedray.tracking.data_inputs import DESCRIBED
from fedray.tracking.sent import SentPoints
from fedray.tracking.tracked import Tracking, open_tracker
from rllib_pruner.files import TrainFiles
from rllib_pruner.networks import convert
from tests.experiment import tiny

SHAPE = Shape({"n": int}, {"who": str}, inside={"a": Shape(each=float)}, items={"b": Shape({"x": str})})


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        ({"n": 1, "who": "me", "a": {"p": 1, "q": 0.5}, "b": [{"x": "y"}]}, None),
        ({}, "it has no n"),
        ({"n": 1.5}, "its n is 1.5"),
        ({"n": True}, "its n is True"),
        ({"n": 1, "who": None}, "its who is None"),
        ({"n": 1, "a": {"p": "x"}}, "in its a, its p is 'x'"),
        ({"n": 1, "a": 3}, "in its a, 3 is no mapping"),
        ({"n": 1, "b": [{"x": "y"}, 7]}, "in its b, 7 is no mapping"),
        ({"n": 1, "b": {"k": {}}}, "in its b, it has no x"),
        ({"n": 1, "b": 7}, "its b is 7"),
        ([1], "[1] is no mapping"),
    ],
)
def test_a_shape_names_its_fault(value: Any, fault: str | None) -> None:
    assert SHAPE.fault(value) == fault


def test_nan_is_no_number_and_a_whole_number_is_a_float() -> None:
    assert is_a(1, float) and is_a(0.5, float) and is_a(None, (float, type(None)))
    assert not any(is_a(value, float) for value in (float("nan"), float("inf"), True, "1", None))


def test_a_record_is_refused_with_file_and_advice(tmp_path: Path) -> None:
    record = Record("a.json", SHAPE, "or remove it: then it is made anew")
    assert record.read(tmp_path) is None
    for content, fault in (({"n": "x"}, "its n is 'x'"), ([1], "it does not hold a JSON mapping")):
        (tmp_path / "a.json").write_text(json.dumps(content))
        with pytest.raises(
            RunError, match=r"a\.json: is damaged: .*; restore it from a copy, or remove it"
        ) as error:
            record.read(tmp_path)
        assert fault in str(error.value)


def test_lines_are_refused_with_file_line_and_advice(tmp_path: Path) -> None:
    records = Records("a.jsonl", {"n": SHAPE, "end": Shape({"end": str})})
    assert records.read(tmp_path) == []
    append_lines(tmp_path / "a.jsonl", [{"n": 1}, {"end": "x"}, {"other": 2}])
    with pytest.raises(
        RunError, match=r"a\.jsonl, line 3: is damaged: it has no n or end; restore it from a copy"
    ):
        records.read(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one round."""
    path = tmp_path_factory.mktemp("records") / "run"
    run(tiny.config({"rounds": 1}), out=path)
    return path


class Odd:
    """Objects of a store whose manifest another program wrote."""

    place = "s3://bucket/run"

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def get(self, name: str) -> bytes:
        """Return the manifest."""
        assert name == MANIFEST
        return as_mapping(self.tree)


MANIFESTED = {"format": 1, "generation": 1, "id": "a", "files": {"config.yaml": [3, "0" * 64]}}


@pytest.mark.parametrize(
    "change",
    [
        *({"files": 3}, {"files": {"a": 3}}, {"files": {"a": [1]}}, {"files": {"a": ["1", "0"]}}),
        *({"generation": "1"}, {"generation": None}, {"id": 7}),
    ],
)
def test_a_manifest_of_another_shape_is_damaged(change: dict[str, Any]) -> None:
    objects: Any = Odd(MANIFESTED)
    assert read_manifest(objects).generation == 1
    objects.tree = MANIFESTED | change
    with pytest.raises(RunError, match=r"s3://bucket/run: manifest\.json is damaged: "):
        read_manifest(objects)


ODD: dict[str, tuple[Any, Callable[[Path], object]]] = {
    "mlflow.json": ({"run_id": ["x"]}, lambda path: store_of(path)),
    "published.json": ({"place": "s3://a", "generation": float("inf"), "files": {}}, Known.read),
    "registered.json": ({"method.name": ["x"]}, lambda path: resumed_config(RunFiles(path))),
    "imports.json": ({"/a.py": 3}, lambda path: resumed_config(RunFiles(path))),
    "data.json": ({"name": "x", "source": "", "parts": {"test": 3}}, lambda path: DESCRIBED.read(path)),
    "stopped.json": ({"round": "2"}, lambda path: STOP_RECORD.read(path)),
    "spent.json": ({}, lambda path: Budget(path, 10.0)),
    "lineage.jsonl": ({"round": 2}, lineage),
    "perturbed.jsonl": ({"round": 2, "exploits": [3]}, lambda path: fork_if_due(path, "a", 0.0)),
    "points.jsonl": ({"suggested": "x"}, search_ended),
}


@pytest.mark.parametrize("name", ODD)
def test_a_file_of_another_shape_is_refused_by_name_with_advice(whole: Path, name: str) -> None:
    content, use = ODD[name]
    file = whole / name
    before = file.read_bytes() if file.exists() else None
    try:
        file.write_text(json.dumps(content) + ("\n" if name.endswith("l") else ""))
        with pytest.raises(RunError, match="is damaged: ") as error:
            use(whole)
        assert str(file) in str(error.value)
        assert "restore it from a copy" in str(error.value) or "fetches a copy" in str(error.value)
    finally:
        file.unlink()
        if before is not None:
            file.write_bytes(before)


@pytest.mark.parametrize("read", [lambda path: tracked_runs([path]), lambda path: TrainFiles(path).run_id()])
def test_an_id_of_mlflow_may_be_missing(whole: Path, read: Callable[[Path], object]) -> None:
    (whole / TRACKED.name).write_text("{}")
    assert read(whole) in (None, ([], []))
    (whole / TRACKED.name).unlink()


def test_a_tracker_of_a_run_refuses_an_odd_description(whole: Path) -> None:
    (whole / "data.json").rename(whole / "kept.json")
    (whole / "data.json").write_text('{"name": "x"}')
    with pytest.raises(RunError, match=r"data\.json: is damaged: it has no source"):
        open_tracker(tiny.config(), RunFiles(whole), Tracking())
    (whole / "kept.json").rename(whole / "data.json")


@pytest.mark.parametrize(
    "line",
    [
        {"metrics": {"a": 1.0}},
        {"step": "x", "time_ms": 5, "metrics": {"a": 1.0}},
        {"step": 1, "time_ms": 5, "metrics": [1]},
        {"step": 1, "time_ms": 5, "metrics": {"a": "x"}},
        {"mark": 3},
    ],
)
def test_points_of_another_shape_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, line: dict[str, Any]
) -> None:
    sound = {"step": 2, "time_ms": 7, "metrics": {"b": 0.5}}
    append_lines(tmp_path / "mlflow-sent.jsonl", [line, {"mark": "m"}, sound])
    sent = SentPoints(tmp_path / "mlflow-sent.jsonl")
    assert "mlflow-sent.jsonl: is damaged" in caplog.text
    assert sent.mark == "m" and sent.sending(2, {"b": 9.0}) == [("b", 0.5, 7)]


@pytest.mark.parametrize("text", ["[]", "{", "7", '{"format": 2}', None])
def test_what_is_no_policy_of_an_earlier_version_is_not_converted(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "policy.json").write_text(text)
    with pytest.raises(ConfigError, match=r"policy\.json|only format 1"):
        convert(tmp_path)
