"""A trained agent as the server uses it: a folder with `policy.json` and its small network.

    policy.json             process, observations, actions, training and scores of the agent
    network.safetensors     the network, without optimizer, replay and environment

`fedray agent train` writes such folders with `save`; those of `shipped` come with the package. Using one
needs neither RLlib nor Ray. Both files hold data only: no pickles.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedray.durable import as_mapping, pass_fences, read_mapping, replace_folder
from fedray.errors import ConfigError, RunError
from fedray.policies.network import Network

FORMAT = 2
"""Of the folder; a reader refuses any other."""
NETWORK = "network.safetensors"
PICKLED = 1
"""The format of earlier versions, whose network was a pickle."""

_NEEDED = {"process": str, "version": int, "features": int, "actions": list, "algorithm": str}
_ALGORITHMS = ("dqn", "ppo")


@dataclass(frozen=True)
class PolicyInterface:
    """The inputs and outputs of a policy; a trained one is used only where they are the process's own.

    Args:
        process: name of the decision process.
        version: number of the observation's meaning; a change of meaning raises it.
        features: numbers in an observation.
        actions: names of the actions, by index.
    """

    process: str
    version: int
    features: int
    actions: tuple[str, ...]


class TrainedPolicy:
    """A policy that `fedray agent train` wrote; `load` makes one.

    Args:
        network: values the actions.
        about: content of `policy.json`.
    """

    def __init__(self, network: Network, about: Mapping[str, Any]) -> None:
        self.network, self.about = network, about

    @classmethod
    def load(cls, folder: Path | None, interface: PolicyInterface) -> "TrainedPolicy":
        """Read a policy; a second call returns the same object.

        Args:
            folder: written by `fedray agent train`; None: the policy that ships for the process.
            interface: of the process that will use the policy.

        Raises:
            ConfigError: if the policy does not fit the process; the message says how to train one that does.
        """
        problem = policy_problem(folder, interface)
        if problem is not None:
            raise ConfigError(problem)
        folder = (folder or shipped(interface.process)).resolve()
        return _load(folder, (folder / "policy.json").read_text(encoding="utf-8"))

    def act(self, observation: NDArray[np.float32], allowed: Sequence[int] | None = None) -> int:
        """Return the index of the greedy action for an observation of shape (features,).

        Args:
            observation: of the process.
            allowed: actions to choose from; None: all.
        """
        return int(self.acts(observation[None], allowed)[0])

    def acts(
        self, observations: NDArray[np.float32], allowed: Sequence[int] | None = None
    ) -> NDArray[np.int64]:
        """Return the greedy actions for observations of shape (n, features), as indices of shape (n,)."""
        values = self._values(observations)
        if allowed is not None:
            refused = np.setdiff1d(np.arange(values.shape[1]), allowed)
            values[:, refused] = -np.inf
        return np.asarray(values.argmax(axis=1), dtype=np.int64)

    def _values(self, observations: NDArray[np.float32]) -> NDArray[np.float32]:
        """Return the network's values or logits of each action, (n, actions); NaN counts as the worst."""
        import torch

        found = self.network(torch.from_numpy(np.array(observations, dtype=np.float32)))
        values = np.array(found.numpy(), dtype=np.float32)
        values[np.isnan(values)] = -np.inf
        return values


def shipped(process: str) -> Path:
    """Return the folder of a process's policy in the package; it need not exist."""
    return Path(__file__).parent / "shipped" / process


def policy_problem(folder: Path | None, interface: PolicyInterface) -> str | None:
    """Return why a process cannot use a policy, or None; reads a few kB and imports nothing heavy.

    Args:
        folder: as for `TrainedPolicy.load`.
        interface: as for `TrainedPolicy.load`.
    """
    folder = folder or shipped(interface.process)
    try:
        about = read_mapping(folder / "policy.json")
    except RunError as error:
        reason: str | None = str(error).removeprefix(f"{folder}/")
    else:
        reason = "there is no policy.json in it" if about is None else _damage(folder, about)
        reason = reason or _mismatch(about or {}, interface)
    return f"policy {folder}: {reason}; {_retrain(interface.process)}" if reason else None


def save(network: Network, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a policy, replacing `folder`.

    Args:
        network: values the actions.
        folder: of the policy.
        about: the fields of `PolicyInterface`, `algorithm` (dqn or ppo), and any more. `save` adds the
            format, the versions of Ray and torch unless it has them, and the digest of the network's file.
    """
    pass_fences(folder)
    partial = folder.with_name(f".{folder.name}.writing")
    rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    data = network.save()
    (partial / NETWORK).write_bytes(data)
    versions = {name: metadata.version(name) for name in ("ray", "torch")}
    files = {NETWORK: sha256(data).hexdigest()}
    (partial / "policy.json").write_bytes(as_mapping({"format": FORMAT, **versions, **about, "files": files}))
    replace_folder(partial, folder)


@lru_cache(maxsize=8)
def _load(folder: Path, text: str) -> TrainedPolicy:
    """Load a folder that has no problem; `text` is its policy.json, so that a changed one is loaded again."""
    about = json.loads(text)
    try:
        network = Network.load((folder / NETWORK).read_bytes())
    except (OSError, ValueError) as error:
        reason = f"{NETWORK} cannot be read: {error}"
    else:
        if (network.features, network.actions) == (about["features"], len(about["actions"])):
            return TrainedPolicy(network, about)
        reason = (
            f"its network takes {network.features} number(s) for {network.actions} action(s), and "
            f"policy.json has {about['features']} and {len(about['actions'])}"
        )
    raise ConfigError(f"policy {folder}: {reason}; {_retrain(about['process'])}")


def _damage(folder: Path, about: Mapping[str, Any]) -> str | None:
    """Return which file is missing or damaged, or None."""
    found = about.get("format")
    if found == PICKLED:
        return (
            "it has format 1, whose network is a pickle, which could run any code; if you trust it, convert "
            f"it with `python -m rllib_pruner.networks {folder}`"
        )
    if found != FORMAT:
        return f"policy.json has format {found!r}, and this version reads {FORMAT}"
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(about.get(key), kind)]
    if wrong or not isinstance(about.get("files"), dict):
        return f"policy.json lacks {', '.join(wrong or ['files'])}"
    try:
        sound = sha256((folder / NETWORK).read_bytes()).hexdigest() == about["files"].get(NETWORK)
    except OSError:
        return f"{NETWORK} is missing"
    return None if sound else f"{NETWORK} is damaged: it is not the file that policy.json names"


def _mismatch(about: Mapping[str, Any], wants: PolicyInterface) -> str | None:
    """Return why an undamaged policy does not fit a process."""
    if about["process"] != wants.process:
        return f"it decides in the process {about['process']!r}, not in {wants.process!r}"
    if about["version"] != wants.version:
        return f"it reads observations of version {about['version']}, and {wants.process} has {wants.version}"
    if about["features"] != wants.features:
        return (
            f"it reads {about['features']} number(s), and an observation of {wants.process} has "
            f"{wants.features}"
        )
    if about["actions"] != list(wants.actions):
        theirs, ours = (", ".join(map(str, actions)) for actions in (about["actions"], wants.actions))
        return f"its actions are {theirs or 'none'}, and those of {wants.process} are {ours}"
    if about["algorithm"] not in _ALGORITHMS:
        return f"its algorithm is {about['algorithm']!r}, and only {' and '.join(_ALGORITHMS)} can be used"
    return None


def _retrain(process: str) -> str:
    """Return how to get a policy that fits."""
    command = f"fedray agent train tune_configs/rl_{process}.yaml --out DIR"
    return f"train one with `{command}`, then give the folder DIR/policy"
