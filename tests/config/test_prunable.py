"""What may be pruned is said in the config."""

import pytest

from fedray.config.run_config import RunConfig
from fedray.errors import ConfigError
from fedray.experiment.run import Federation

BASE = {"model": "lenet5", "clients": {"population": 10, "cohort": 2}, "tracking": {"uri": "none"}}


@pytest.mark.parametrize(
    ("changes", "first", "last"),
    [({}, True, False), ({"prune_first": False}, False, False), ({"prune_last": True}, True, True)],
)
def test_the_first_and_the_last_layer(changes, first, last):
    layout = Federation.of(RunConfig.from_tree(BASE | changes)).place.model.layout
    assert ("conv1.weight" in layout.prunable_names) == first
    assert ("fc3.weight" in layout.prunable_names) == last
    assert {"conv2.weight", "fc1.weight", "fc2.weight"} <= set(layout.prunable_names)


def test_the_default_leaves_the_digest_as_it_was_and_another_choice_does_not():
    config = RunConfig.from_tree(BASE)
    assert RunConfig.from_tree(BASE | {"prune_first": True, "prune_last": False}).digest == config.digest
    digests = {
        config.digest,
        config.override(prune_first=False).digest,
        config.override(prune_last=True).digest,
    }
    assert len(digests) == 3


def test_yes_or_no():
    with pytest.raises(ConfigError, match=r"prune_last .*got 'no'"):
        RunConfig.from_tree(BASE | {"prune_last": "no"})
