"""`norm` in a config: who may choose it, where it is recorded, and what a run makes of it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fedray.config import yaml_text
from fedray.errors import ConfigError
from fedray.experiment.run import resume, run
from fedray.federation.server import Server
from fedray.models import MODELS
from fedray.tracking.provenance import declared, run_tags
from fedray.types import RoundReport
from tests import small
from tests.experiment import tiny

POLICIES = ("average", "local", "static", "group")


@pytest.fixture(autouse=True)
def a_small_network_with_batch_norm() -> Iterator[None]:
    """Put one into the table; afterwards the table is as it was, its order too."""
    before = dict(MODELS)
    MODELS["small_cnn"] = small.CNN
    yield
    MODELS.clear()
    MODELS.update(before)


def test_a_model_without_batch_norm_has_nothing_to_choose():
    for name in [name for name in MODELS if name not in ("mlp", "small_cnn", "vgg11")]:
        del MODELS[name]
    assert tiny.config(norm="average").norm == "average"
    for norm in ("local", "static", "group"):
        with pytest.raises(ConfigError, match=rf"norm.*{norm}, but mlp has no BatchNorm.*one: small_cnn$"):
            tiny.config(norm=norm)
        assert tiny.config(norm=norm, model="small_cnn").norm == norm


def test_an_unknown_policy_is_refused_with_those_that_there_are():
    with pytest.raises(ConfigError, match=r"norm.*'batch'.*'average', 'local', 'static' or 'group'"):
        tiny.config(norm="batch", model="small_cnn")


def test_an_unknown_model_is_reported_once_whatever_its_norm():
    with pytest.raises(ConfigError, match="model") as refused:
        tiny.config(norm="local", model="small_cmm")
    assert len(str(refused.value).splitlines()) == 1


def test_the_policy_names_the_result_but_the_usual_one_changes_no_name():
    digests = {tiny.config(norm=norm, model="small_cnn").digest for norm in POLICIES}
    assert len(digests) == 4
    assert tiny.config(model="small_cnn").digest in digests


def test_what_is_declared():
    config = tiny.config({"norm": "static", "model": "small_cnn", "data.server_fraction": 0.1})
    assert declared(config) == {
        "norm": "static",
        "weight_standardization": False,
        "zero_policy": "enforce",
        "precision": "fp32",
        "server_data": 0.0,
        "client_accuracy": "training examples",
    }
    frlp = {"name": "frlp", "zeros": "regrow"}
    config = tiny.config({"data.server_fraction": 0.1, "method": frlp, "rounds": 70})
    assert declared(config) == {
        "norm": "average",
        "weight_standardization": False,
        "zero_policy": "regrow",
        "precision": "fp32",
        "server_data": 0.1,
        "client_accuracy": "training examples",
    }
    tags = run_tags(method="frlp", dataset="digits", model="mlp", digest="0", **declared(config))
    assert (tags["norm"], tags["zero_policy"], tags["server_data"]) == ("average", "regrow", "0.1")


def test_what_is_declared_is_among_the_tags(tmp_path, monkeypatch):
    given: dict[str, object] = {}
    monkeypatch.setattr("fedray.tracking.tracked.run_tags", lambda **tags: given.update(tags) or {})
    config = tiny.config({"norm": "group", "model": "small_cnn", "rounds": 1})
    run(config, out=tmp_path / "run")
    assert {"norm": "group", "zero_policy": "enforce", "server_data": 0.0}.items() <= given.items()


def without_clocks(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if not name.endswith("wall_s")}


def own_accuracy(path: Path) -> list[float]:
    return list(pd.read_parquet(path / "client_accuracy.parquet")["accuracy"])


@pytest.mark.parametrize("norm", POLICIES)
def test_a_run_records_its_policy_and_ends_alike_when_resumed(norm, tmp_path):
    config = tiny.config({"norm": norm, "model": "small_cnn", "clients.cohort": 4})
    whole = run(config, out=tmp_path / "whole")
    assert yaml_text.load(tmp_path / "whole" / "config.yaml")["norm"] == norm
    result = json.loads((tmp_path / "whole" / "result.json").read_text())
    assert (result["norm"], result["zero_policy"], result["server_data"]) == (norm, "enforce", 0.0)

    def stop(report: RoundReport) -> None:
        if report.round == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, out=tmp_path / "torn", on_round=stop)
    for checkpoint in (tmp_path / "torn" / "checkpoints").glob("round-000004.pt"):
        checkpoint.unlink()  # go on from after round 2
    torn = resume(tmp_path / "torn")
    assert torn.weights_sha256 == whole.weights_sha256
    assert without_clocks(torn.result) == without_clocks(whole.result)
    assert [*map(without_clocks, torn.rounds)] == [*map(without_clocks, whole.rounds)]
    assert own_accuracy(torn.path) == own_accuracy(whole.path)


def test_a_client_is_tried_with_its_own_norms(tmp_path, monkeypatch):
    config = tiny.config({"norm": "local", "model": "small_cnn", "clients.cohort": 6, "method.lr": 0.2})
    asked: list[int | None] = []
    evaluate = Server.evaluate

    def watched(server: Server, examples, client=None):
        asked.append(client)
        return evaluate(server, examples, client)

    monkeypatch.setattr(Server, "evaluate", watched)
    run(config, out=tmp_path / "own")
    assert asked[-6:] == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(Server, "evaluate", lambda server, examples, client=None: evaluate(server, examples))
    run(config, out=tmp_path / "common")
    assert own_accuracy(tmp_path / "own") != own_accuracy(tmp_path / "common")
