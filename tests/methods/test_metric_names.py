"""Methods say which metrics of their own a round may hold: a sweep relies on it before anything starts."""

import pytest

from fedray.experiment.run import run
from fedray.federation.method import Method
from fedray.methods import METHODS
from fedray.types import METRICS
from tests.experiment import tiny

OPTIONS: dict[str, list[dict[str, object]]] = {
    "staged": [{}, {"importance": "gradient"}, {"policy": "bandit", "stages": 3}],
    "fedlp": [{}],
}


@pytest.mark.parametrize("name", METHODS)
def test_a_round_holds_no_metric_that_the_method_does_not_name(name, tmp_path):
    for number, options in enumerate(OPTIONS.get(name, [{}])):
        config = tiny.config(
            {
                "method": {"name": name, **options},
                "data.server_fraction": 0.1,
                "model": "lenet5" if name in ("fedlp", "fedavg_small") else "mlp",
            }
        )
        names = config.method.options.metric_names
        assert names is not None
        history = run(config, out=tmp_path / str(number))
        own = {
            metric
            for line in history.rounds
            for metric in line
            if metric.startswith(("train/", "method/")) and metric not in METRICS
        }
        assert own <= set(names)
        if options.get("policy") == "bandit":
            assert own == set(names)


def test_what_is_not_said_is_not_known():
    class Measuring(Method):
        def measures(self, state):
            return {"x": 1.0}

    class Sending(Method):
        def client_update(self, task, client):
            raise NotImplementedError

    class Pruning(Method):
        def prune(self, state, cohort, ctx):
            return state

    assert Measuring().metric_names is None
    assert Sending().metric_names is None
    assert Pruning().metric_names == ()
