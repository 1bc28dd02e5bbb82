"""What pruning saves on the wire, by the runs' own files, on real data."""

import pytest

import fedray
from fedray.config.run_config import RunConfig
from fedray.storage.run_files import RunFiles

BASE = {
    "rounds": 4,
    "eval_every": 100,
    "model": "cnn",
    "clients": {"population": 1000, "cohort": 3, "devices": {"laptop": 1.0}, "actors": 0},
    "tracking": {"uri": "none"},
}


@pytest.mark.slow
def test_at_density_a_tenth_staged_uploads_at_most_an_eighth_of_what_fedavg_does(data_root, in_tmp):
    base = RunConfig.from_tree(BASE | {"data": {"name": "fashion_mnist", "root": str(data_root)}})
    staged = {"method.name": "staged", "method.density": 0.1, "method.stages": 1, "method.start": 0.25}
    up = {}
    for name, changes in {"fedavg": {}, "staged": staged}.items():
        history = fedray.run(base.override(changes), out=in_tmp / name)
        up[name] = {line["round"]: line["metrics"]["bytes/up"] for line in RunFiles(history.path).rounds()}
    pruned_rounds = (2, 3, 4)  # the one stage is after round 1
    assert up["staged"][1] == up["fedavg"][1]
    ratio = sum(up["staged"][r] for r in pruned_rounds) / sum(up["fedavg"][r] for r in pruned_rounds)
    assert 0.1 < ratio <= 0.12
