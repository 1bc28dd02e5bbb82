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
from gymnasium.spaces import Box, Discrete

from fedray.errors import ConfigError
from fedray.policies import observation, rate_search
from fedray.policies.rate_search import ACTIONS, PROCESS
from fedray.policies.trained import (
    PARTS,
    PolicyInterface,
    TrainedPolicy,
    policy_problem,
    quiet,
    save,
    shipped,
)

ROOT = Path(__file__).parents[2]
OBSERVATIONS = np.linspace(0, 1, 50, dtype=np.float32).reshape(-1, 2)
MADE_UP = PolicyInterface("made up", 3, 2, ("a", "b", "c"))
ABOUT = asdict(MADE_UP)


def network(algorithm: str) -> Any:
    """Return an untrained module of RLlib's for observations of two numbers and three actions."""
    with quiet():
        from ray.rllib.algorithms.dqn.torch.default_dqn_torch_rl_module import DefaultDQNTorchRLModule
        from ray.rllib.algorithms.ppo.ppo_catalog import PPOCatalog
        from ray.rllib.algorithms.ppo.torch.default_ppo_torch_rl_module import DefaultPPOTorchRLModule
        from ray.rllib.core.rl_module.default_model_config import DefaultModelConfig

        layers = asdict(DefaultModelConfig(fcnet_hiddens=[8]))
        heads = {
            "dueling": False,
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
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


# ── what is loaded


@pytest.mark.parametrize("algorithm", ["dqn", "ppo"])
def test_what_is_loaded_decides_as_what_was_saved(algorithm: str, tmp_path: Path) -> None:
    module, about = network(algorithm), {**ABOUT, "algorithm": algorithm}
    save(module, tmp_path / "policy", about)
    loaded = TrainedPolicy.load(tmp_path / "policy", MADE_UP)
    actions = loaded.acts(OBSERVATIONS)
    assert actions.shape == (25,) and actions.dtype == np.int64 and set(actions) <= {0, 1, 2}
    np.testing.assert_array_equal(actions, TrainedPolicy(module, about).acts(OBSERVATIONS))
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
    assert sorted(path.name for path in (folder / "module").iterdir()) == sorted(PARTS)


def test_the_policy_that_ships_needs_neither_rllib_pruner_nor_a_running_ray() -> None:
    code = (
        "import sys; sys.modules['rllib_pruner'] = None\n"
        "import numpy as np\n"
        "from fedray.policies.rate_search import INTERFACE\n"
        "from fedray.policies.trained import TrainedPolicy\n"
        "agent = TrainedPolicy.load(None, INTERFACE)\n"
        "actions = agent.acts(np.linspace(0, 0.99, 100, dtype=np.float32)[:, None])\n"
        "import ray\n"
        "print(ray.is_initialized(), sorted(set(actions.tolist())))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.stdout, done.stderr) == (f"False [{ACTIONS.index('increase')}]\n", "")


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
        ({"ray": "2.59.1"}, f"was written by Ray 2.59.1, and installed is Ray {metadata.version('ray')}"),
        ({"algorithm": "sac"}, "its algorithm is 'sac', and only dqn and ppo can be used"),
        ({"format": 2}, "has format 2, and this version reads 1"),
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


def test_another_patch_of_the_same_ray_will_do(folder: Path) -> None:
    major, minor, *_ = metadata.version("ray").split(".")
    rewrite(folder, ray=f"{major}.{minor}.99")
    assert policy_problem(folder, MADE_UP) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}"])
def test_a_policy_json_that_is_none(folder: Path, text: str) -> None:
    (folder / "policy.json").write_text(text)
    assert "policy.json" in problem(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_damaged_module(folder: Path, part: str) -> None:
    place = folder / "module" / part
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert f"module/{part} is damaged" in problem(folder)
    place.unlink()
    assert f"module/{part} is missing" in problem(folder)


def test_a_module_that_rllib_cannot_load(folder: Path) -> None:
    # whole as far as the digests say, but not a module
    (folder / "module" / PARTS[0]).write_bytes(b"nothing")
    files = json.loads((folder / "policy.json").read_text())["files"]
    rewrite(folder, files=files | {PARTS[0]: sha256(b"nothing").hexdigest()})
    assert policy_problem(folder, MADE_UP) is None
    with pytest.raises(ConfigError, match=r"RLlib cannot load it \(UnpicklingError.*fedray agent train"):
        TrainedPolicy.load(folder, MADE_UP)


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
    import torch

    policy = TrainedPolicy(network("ppo"), {**ABOUT, "algorithm": "ppo"})
    logits = torch.tensor([[0.1, torch.nan, 0.3]])
    monkeypatch.setattr(policy._module, "forward_inference", lambda _: {"action_dist_inputs": logits})
    assert policy.act(OBSERVATIONS[0]) == 2
