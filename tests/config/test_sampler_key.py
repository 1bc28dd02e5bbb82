"""`clients.sampler`: a name chooses a sampler, over_selection means `fastest`, and digests stay."""

import re
from typing import Any

import pytest

import fedray
from fedray.config.run_config import RunConfig
from fedray.config.trees import decisive
from fedray.errors import ConfigError
from fedray.federation.sampling import Fastest, Oort, PowerOfChoice, Sampler
from tests.experiment import tiny


def sampler(clients: dict[str, Any]) -> Sampler:
    return RunConfig(clients=clients).clients.sampler.options


def test_a_name_chooses_a_sampler():
    assert sampler({}) == Sampler()
    assert sampler({"sampler": {"name": "fastest"}}) == Fastest(over_selection=0.3)
    assert sampler({"sampler": {"name": "oort", "penalty": 1}}) == Oort(penalty=1.0)
    assert sampler({"sampler": PowerOfChoice(candidates=3.0)}) == PowerOfChoice(candidates=3.0)
    changed = RunConfig().override({"clients.sampler.name": "power_of_choice", "clients.sampler.ask": False})
    assert changed.clients.sampler.options == PowerOfChoice(ask=False)
    assert changed.override({"clients.sampler.name": "oort"}).clients.sampler.options == Oort()


@pytest.mark.parametrize("options", [{}, {"exploration": 0.5}, {"most_times": 3, "scaled": False}])
def test_a_config_reads_what_it_writes(options: dict[str, Any]):
    config = RunConfig(clients={"sampler": {"name": "oort"} | options})
    assert RunConfig.from_tree(config.to_tree()) == config
    assert config.to_tree()["clients"]["sampler"]["penalty"] == 2.0
    assert config.given_tree()["clients"]["sampler"] == {"name": "oort"} | options


def test_over_selection_means_the_sampler_fastest():
    config = RunConfig(clients={"over_selection": 0.5})
    assert config.clients.sampler.options == Fastest(over_selection=0.5)
    assert RunConfig.from_tree(config.to_tree()) == config, "config.yaml names both, and they agree"
    assert config.given_tree()["clients"] == {"over_selection": 0.5}
    assert config.override({"clients.over_selection": 0.2}).clients.sampler.options == Fastest(
        over_selection=0.2
    )
    assert config.override({"clients.over_selection": 0}).clients.sampler.options == Sampler()


@pytest.mark.parametrize("name", ["uniform", "oort", "power_of_choice", "fastest"])
def test_over_selection_beside_another_sampler_is_refused(name: str):
    text = rf"^clients\.over_selection \(.*\): 0\.5, which means the sampler fastest .* name={name}; set "
    with pytest.raises(ConfigError, match=text):
        RunConfig(clients={"over_selection": 0.5, "sampler": {"name": name}})
    RunConfig(clients={"over_selection": 0.0, "sampler": {"name": name}})


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"name": "ort"}, "clients.sampler.name (x): unknown sampler 'ort'; did you mean 'oort'?"),
        (
            {"name": "oort", "penality": 1},
            "oort has no such option; did you mean 'penalty'? Keys here: clip,",
        ),
        ({"name": "uniform", "penalty": 1}, "uniform has no such option; oort can have it. Keys here: name"),
        ({"name": "oort", "clip": 2}, "clients.sampler.clip (x): got 2; must be less than or equal to 1"),
        ("oort", "to choose one, write clients.sampler.name=oort"),
    ],
)
def test_misuse(given: Any, text: str):
    with pytest.raises(ConfigError, match=re.escape(text)):
        RunConfig.from_tree({"clients": {"sampler": given}}, "x")


def test_the_digest_of_a_config_without_a_sampler_is_as_it_was():
    over = RunConfig(model="lenet5", clients={"over_selection": 0.5, "cohort": 4})
    assert (RunConfig().digest, over.digest) == ("49d7c4b9e8c1", "47f084779b03")


def test_the_digest_names_the_cohorts_and_not_the_key_that_chose_them():
    def digest(**clients: Any) -> str:
        return RunConfig(clients=clients).digest

    assert digest(sampler={"name": "uniform"}) == digest() == digest(over_selection=0.0)
    assert digest(sampler={"name": "fastest", "over_selection": 0.5}) == digest(over_selection=0.5)
    several = {
        digest(),
        digest(sampler={"name": "fastest"}),
        digest(sampler={"name": "oort"}),
        digest(sampler={"name": "oort", "penalty": 1}),
        digest(sampler={"name": "power_of_choice"}),
    }
    assert len(several) == 5
    before = RunConfig().to_tree()
    del before["clients"]["sampler"]  # a config.yaml of an earlier version
    assert decisive(before) == decisive(RunConfig().to_tree())


MANY: dict[str, Any] = {"clients.population": 30}


def test_over_selection_and_fastest_end_with_the_same_weights(tmp_path):
    def weights(**clients: Any) -> str:
        config = tiny.config(MANY | {f"clients.{key}": value for key, value in clients.items()})
        return fedray.run(
            config, out=tmp_path / config.clients.sampler.name / str(len(clients))
        ).weights_sha256

    over = weights(over_selection=1.0)
    assert over == weights(sampler={"name": "fastest", "over_selection": 1.0}, jitter=0.2) != weights()


@pytest.mark.parametrize("name", ["oort", "power_of_choice"])
def test_a_run_that_ends_early_is_resumed_with_the_same_bits(name: str, tmp_path):
    config = tiny.config(MANY | {"clients.sampler.name": name, "checkpoint_every": 1})
    fedray.run(config, out=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fedray.run(config, out=tmp_path / "ended", on_round=tiny.ending(2, KeyboardInterrupt))
    fedray.resume(tmp_path / "ended")
    assert tiny.figures(tmp_path / "ended") == tiny.figures(tmp_path / "whole")
