"""Trained policies: what is loaded is what was saved, by itself; and what cannot be used is refused."""

import json
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete

from fedray.durable import as_mapping, read_mapping
from fedray.errors import ConfigError
from fedray.policies import observation, rate_search
from fedray.policies.network import Network
from fedray.policies.rate_search import ACTIONS, PROCESS
from fedray.policies.trained import (
    NETWORK,
    PolicyInterface,
    TrainedPolicy,
    policy_problem,
    save,
    shipped,
)
from rllib_pruner.networks import convert, network_of, quiet

ROOT = Path(__file__).parents[2]
OBSERVATIONS = np.linspace(0, 1, 50, dtype=np.float32).reshape(-1, 2)
MADE_UP = PolicyInterface("made up", 3, 2, ("a", "b", "c"))
ABOUT = asdict(MADE_UP)


def module_of(algorithm: str, dueling: bool = False, hidden: tuple[int, ...] = (8,)) -> Any:
    """Return an untrained module of RLlib's for observations of two numbers and three actions."""
    with quiet():
        from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
        from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
        from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
        from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

        layers = asdict(DefaultModelConfig(fcnet_hiddens=list(hidden), fcnet_activation="relu"))
        heads = {
            "dueling": dueling,
            "double_q": True,
            "num_atoms": 1,
            "v_min": -10,
            "v_max": 10,
            "std_init": 0.1,
        }
        kinds: dict[str, tuple[type[Any], dict[str, Any]]] = {
            "dqn": (DefaultDQNTorchRLModule, {"model_config": layers | heads | {"epsilon": 0.0}}),
            "ppo": (DefaultPPOTorchRLModule, {"model_config": layers, "catalog_class": PPOCatalog}),
        }
        kind, options = kinds[algorithm]
        space = Box(0, 1, (2,), np.float32)
        return kind(observation_space=space, action_space=Discrete(3), inference_only=True, **options)


def network(algorithm: str) -> Network:
    """Return an untrained network for observations of two numbers and three actions."""
    return network_of(module_of(algorithm))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that was saved by `save`."""
    folder = tmp_path_factory.mktemp("a policy") / "policy"
    save(network("dqn"), folder, {**ABOUT, "algorithm": "dqn"})
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that may be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def problem(folder: Path) -> str:
    """Return why a policy cannot be used; loading it must say the same."""
    found = policy_problem(folder, MADE_UP)
    assert found is not None
    with pytest.raises(ConfigError) as raised:
        TrainedPolicy.load(folder, MADE_UP)
    assert str(raised.value) == found
    assert "fedray agent train tune_configs/rl_made up.yaml --out DIR" in found
    return found


def rewrite(folder: Path, **changes: Any) -> None:
    place = folder / "policy.json"
    place.write_bytes(as_mapping((read_mapping(place) or {}) | changes))


# ── what is loaded


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_what_is_loaded_decides_as_what_was_saved(algorithm: str, tmp_path: Path) -> None:
    made, about = network(algorithm), {**ABOUT, "algorithm": algorithm}
    save(made, tmp_path / "policy", about)
    loaded = TrainedPolicy.load(tmp_path / "policy", MADE_UP)
    actions = loaded.acts(OBSERVATIONS)
    assert actions.shape == (25,) and actions.dtype == np.int64 and set(actions) <= {0, 1, 2}
    np.testing.assert_array_equal(actions, TrainedPolicy(made, about).acts(OBSERVATIONS))
    assert [loaded.act(observation) for observation in OBSERVATIONS] == actions.tolist()
    assert loaded.about["ray"] == metadata.version("ray") and loaded.about["actions"] == ["a", "b", "c"]


def test_a_policy_is_loaded_once_unless_it_has_changed(folder: Path) -> None:
    first = TrainedPolicy.load(folder, MADE_UP)
    assert TrainedPolicy.load(folder, MADE_UP) is first
    save(network("dqn"), folder, {**ABOUT, "algorithm": "dqn", "seed": 1})
    second = TrainedPolicy.load(folder, MADE_UP)
    assert second is not first and second.about["seed"] == 1


def test_saving_leaves_nothing_beside_the_policy(folder: Path) -> None:
    assert [path.name for path in folder.parent.iterdir()] == ["policy"]
    assert sorted(path.name for path in folder.iterdir()) == [NETWORK, "policy.json"]


def test_the_policy_that_ships_needs_neither_rllib_pruner_nor_ray() -> None:
    code = (
        "import sys; sys.modules['rllib_pruner'] = sys.modules['ray'] = None\n"
        "import numpy as np\n"
        "from fedray.policies.rate_search import INTERFACE\n"
        "from fedray.policies.trained import TrainedPolicy\n"
        "agent = TrainedPolicy.load(None, INTERFACE)\n"
        "actions = agent.acts(np.linspace(0, 0.99, 100, dtype=np.float32)[:, None])\n"
        "print(sorted(set(actions.tolist())))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (f"[{ACTIONS.index('increase')}]\n", "")


def test_the_policy_that_ships_is_small_and_says_nothing_of_a_machine() -> None:
    files = [path for path in shipped(PROCESS).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 100_000
    for path in files:
        content = path.read_bytes()
        assert not [
            word for word in (b"/home", b"/root", b"/work", b"/tmp", b"rllib_pruner") if word in content
        ]
    about = json.loads((shipped(PROCESS) / "policy.json").read_text())
    assert about["measures"]["score"] == 1.0 and about["actions"] == list(ACTIONS)


# ── what is refused


def test_a_folder_without_a_policy(tmp_path: Path) -> None:
    assert "there is no policy.json in it" in problem(tmp_path)
    assert "there is no policy.json in it" in problem(tmp_path / "absent")


def test_the_one_that_ships_is_named_if_there_is_none() -> None:
    found = policy_problem(None, PolicyInterface("no such process", 1, 1, ()))
    assert found is not None and str(shipped("no such process")) in found


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"process": "stages"}, "decides in the process 'stages', not in 'made up'"),
        ({"version": 2}, "reads observations of version 2, and made up has 3"),
        ({"features": 24}, "reads 24 number(s), and an observation of made up has 2"),
        ({"actions": ["a", "b"]}, "its actions are a, b, and those of made up are a, b, c"),
        ({"actions": ["a", "c", "b"]}, "its actions are a, c, b, and those of made up are a, b, c"),
        ({"actions": ["a", "b", "c", "d"]}, "its actions are a, b, c, d, and"),
        ({"actions": []}, "its actions are none, and those of made up are a, b, c"),
        ({"actions": [1, 2, 3]}, "its actions are 1, 2, 3, and those of made up are a, b, c"),
        ({"algorithm": "sac"}, "its algorithm is 'sac', and only dqn and ppo can be used"),
        ({"format": 3}, "has format 3, and this version reads 2"),
        ({"format": 1}, "a pickle, which could run any code; if you trust it, convert it with `python -m "),
        ({"actions": None}, "policy.json lacks actions"),
        ({"files": None}, "policy.json lacks files"),
    ],
)
def test_a_policy_for_something_else(folder: Path, changes: dict[str, Any], message: str) -> None:
    rewrite(folder, **changes)
    assert message in problem(folder)


@pytest.mark.parametrize("interface", [rate_search.INTERFACE, observation.INTERFACE], ids=lambda i: i.process)
def test_the_shipped_policies_have_the_actions_of_their_processes(interface: PolicyInterface) -> None:
    assert policy_problem(None, interface) is None
    other = replace(interface, actions=(*interface.actions[:-1], "another"))
    found = policy_problem(None, other)
    assert found is not None and f"those of {interface.process} are " in found and "another" in found


@pytest.mark.parametrize("ray", ["1.0.0", None])
def test_any_ray_will_do_also_none(folder: Path, ray: str | None) -> None:
    rewrite(folder, ray=ray)
    assert policy_problem(folder, MADE_UP) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_a_policy_json_that_is_none(folder: Path, text: str) -> None:
    (folder / "policy.json").write_text(text)
    assert "policy.json" in problem(folder)


def test_a_damaged_network(folder: Path) -> None:
    place = folder / NETWORK
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"{NETWORK} is damaged" in problem(folder)
    place.unlink()
    assert f"{NETWORK} is missing" in problem(folder)


def test_a_damaged_policy_json(folder: Path) -> None:
    place = folder / "policy.json"
    place.write_bytes(place.read_bytes().replace(b'"b"', b'"c"'))
    assert "policy.json: is damaged, or was edited: its checksum does not match" in problem(folder)


def test_what_is_no_network_is_refused(folder: Path) -> None:
    from safetensors.torch import save as tensors

    layer = {"encoder.0.weight": torch.ones(8, 2), "encoder.0.bias": torch.ones(8)}
    head = {"head.0.weight": torch.ones(3, 8), "head.0.bias": torch.ones(3)}
    for data, told in [
        (b"nothing", "not a safetensors file"),
        (tensors(layer), "its parts are encoder, not encoder and head"),
        (tensors(layer | head | {"head.7.bias": torch.ones(3)}), "it has tensors of no layer: head.7.bias"),
        (tensors(layer | head | {"head.0.weight": torch.ones(3, 9)}), "head.0 is no layer after the one"),
        (tensors(layer | head | {"head.0.weight": torch.ones(3, 8).double()}), "head.0 is no layer after"),
        (tensors(layer | {"head.0.weight": torch.ones(2, 8), "head.0.bias": torch.ones(2)}), "for 2 action"),
    ]:
        (folder / NETWORK).write_bytes(data)
        rewrite(folder, files={NETWORK: sha256(data).hexdigest()})
        assert policy_problem(folder, MADE_UP) is None
        with pytest.raises(ConfigError, match=rf"{told}.*fedray agent train"):
            TrainedPolicy.load(folder, MADE_UP)


@pytest.mark.parametrize("dueling", [False, True])
@pytest.mark.parametrize("hidden", [(8,), (16, 4, 8)])
def test_a_network_values_actions_as_rllibs_module(dueling: bool, hidden: tuple[int, ...]) -> None:
    observations = torch.from_numpy(np.random.default_rng(0).normal(size=(500, 2)).astype(np.float32))
    dqn, ppo = module_of("dqn", dueling, hidden), module_of("ppo", hidden=hidden)
    with torch.no_grad():
        values = dqn.compute_q_values({"obs": observations})["qf_preds"]
        logits = ppo.forward_inference({"obs": observations})["action_dist_inputs"]
    for module, expected in ((dqn, values), (ppo, logits)):
        made = network_of(module)
        assert torch.equal(made(observations), expected)
        assert torch.equal(Network.load(made.save())(observations), expected)


def test_another_architecture_is_not_taken_for_one_of_ours() -> None:
    module = module_of("dqn")
    module.encoder.net.mlp[1] = torch.nn.Tanh()
    with pytest.raises(TypeError, match="linear layers and ReLU, not Tanh"):
        network_of(module)


def test_a_policy_of_an_earlier_version_can_be_converted(folder: Path) -> None:
    module = module_of("ppo")
    with quiet():
        module.save_to_path(str(folder / "module"))
    (folder / NETWORK).unlink()
    (folder / "policy.json").write_text(
        json.dumps({"format": 1, **ABOUT, "algorithm": "ppo", "ray": "2.60.0", "files": {}})
    )
    assert f"python -m rllib_pruner.networks {folder}`" in problem(folder)
    convert(folder)
    expected = TrainedPolicy(network_of(module), {}).acts(OBSERVATIONS)
    np.testing.assert_array_equal(TrainedPolicy.load(folder, MADE_UP).acts(OBSERVATIONS), expected)
    assert sorted(path.name for path in folder.iterdir()) == [NETWORK, "policy.json"]
    with pytest.raises(ConfigError, match="has format 2; only format 1 is converted"):
        convert(folder)


def test_no_file_of_the_package_is_a_pickle() -> None:
    package = ROOT / "fedray"
    assert not [path for path in package.rglob("*") if path.suffix in (".pkl", ".pickle", ".pt", ".pth")]


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_the_best_of_what_is_allowed_is_taken(algorithm: str) -> None:
    policy = TrainedPolicy(network(algorithm), {**ABOUT, "algorithm": algorithm})
    values = policy._values(OBSERVATIONS)
    assert policy.acts(OBSERVATIONS).tolist() == values.argmax(1).tolist()
    assert policy.acts(OBSERVATIONS, (0, 1, 2)).tolist() == values.argmax(1).tolist()
    for allowed in ([1], [0, 2], [2, 1]):
        best = [max(sorted(allowed), key=lambda action, row=row: row[action]) for row in values]  # type: ignore[misc]
        assert policy.acts(OBSERVATIONS, allowed).tolist() == best
        assert policy.act(OBSERVATIONS[3], allowed) == best[3]


def test_a_network_that_diverged_does_not_choose_its_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = TrainedPolicy(network("ppo"), {**ABOUT, "algorithm": "ppo"})
    logits = torch.tensor([[0.1, torch.nan, 0.3]])
    monkeypatch.setattr(policy, "network", lambda _: logits)
    assert policy.act(OBSERVATIONS[0]) == 2
