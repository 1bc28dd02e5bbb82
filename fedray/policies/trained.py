"""A trained agent as the server uses it: a folder with `policy.json` and a small RLModule of RLlib.

    policy.json     process, observations, actions, training and scores of the agent
    module/         the network, without optimizer, replay and environment

`fedray agent train` writes such folders with `save`; those of `shipped` come with the package. Using one
needs no Algorithm of RLlib, no running Ray, and nothing of `rllib_pruner`.

A module is a pickle: only use policies that you trust.
"""

import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedray.durable import replace_folder
from fedray.errors import ConfigError

FORMAT = 1
"""Of the folder; a reader refuses any other."""
PARTS = ("class_and_ctor_args.pkl", "metadata.json", "module_state.pkl")
"""Files of `module/`, as RLlib writes them."""

_NEEDED = {"process": str, "version": int, "features": int, "actions": list, "algorithm": str, "ray": str}
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

    Attributes:
        about: content of `policy.json`.
    """

    def __init__(self, module: Any, about: Mapping[str, Any]) -> None:
        self.about = about
        self._module, self._is_dqn = module, about["algorithm"] == "dqn"

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

        batch = {"obs": torch.from_numpy(np.array(observations, dtype=np.float32))}
        with torch.no_grad():
            if self._is_dqn:
                found = self._module.compute_q_values(batch)["qf_preds"]
            else:
                found = self._module.forward_inference(batch)["action_dist_inputs"]
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
        about = json.loads((folder / "policy.json").read_text(encoding="utf-8"))
    except OSError:
        reason: str | None = "there is no policy.json in it"
    except ValueError:
        reason = "policy.json is not JSON"
    else:
        reason = _damage(folder, about) or _mismatch(about, interface)
    return f"policy {folder}: {reason}; {_retrain(interface.process)}" if reason else None


def save(module: Any, folder: Path, about: Mapping[str, Any]) -> None:
    """Write a module with its metadata, replacing `folder`.

    Args:
        module: an RLModule of RLlib with discrete actions.
        folder: of the policy.
        about: the fields of `PolicyInterface`, `algorithm` (dqn or ppo), and any more. `save` adds the
            format, the versions of Ray and torch, and the digests of the files.
    """
    partial = folder.with_name(f".{folder.name}.writing")
    rmtree(partial, ignore_errors=True)
    with quiet():
        module.save_to_path(str((partial / "module").resolve()))
    files = {name: _digest(partial / "module" / name) for name in PARTS}
    versions = {name: metadata.version(name) for name in ("ray", "torch")}
    text = json.dumps({"format": FORMAT, **about, **versions, "files": files}, indent=2)
    (partial / "policy.json").write_text(text + "\n", encoding="utf-8")
    replace_folder(partial, folder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep RLlib's notices and deprecations off the terminal, and from becoming errors."""
    loggers = [logging.getLogger(name) for name in ("ray", "ray.rllib", "ray.tune")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@lru_cache(maxsize=8)
def _load(folder: Path, text: str) -> TrainedPolicy:
    """Load a folder that has no problem; `text` is its policy.json, so that a changed one is loaded again."""
    about = json.loads(text)
    try:
        with quiet():
            from ray.rllib.core.rl_module.rl_module import RLModule
        with quiet():  # once more: Ray sets its loggers' levels when it is imported
            module = RLModule.from_checkpoint(str(folder / "module"))
    except Exception as error:
        reason = f"RLlib cannot load it ({type(error).__name__}: {error})"
        raise ConfigError(f"policy {folder}: {reason}; {_retrain(about['process'])}") from error
    return TrainedPolicy(module, about)


def _damage(folder: Path, about: Any) -> str | None:
    """Return which file is missing or damaged, or None."""
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        found = about.get("format") if isinstance(about, dict) else None
        return f"policy.json has format {found!r}, and this version reads {FORMAT}"
    wrong = [key for key, kind in _NEEDED.items() if not isinstance(about.get(key), kind)]
    if wrong or not isinstance(about.get("files"), dict):
        return f"policy.json lacks {', '.join(wrong or ['files'])}"
    for name in PARTS:
        try:
            sound = _digest(folder / "module" / name) == about["files"].get(name)
        except OSError:
            return f"module/{name} is missing"
        if not sound:
            return f"module/{name} is damaged: it is not the file that policy.json names"
    return None


def _mismatch(about: Mapping[str, Any], wants: PolicyInterface) -> str | None:
    """Return why an undamaged policy does not fit a process or the installed Ray."""
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
    installed = metadata.version("ray")
    if about["ray"].split(".")[:2] != installed.split(".")[:2]:
        return f"it was written by Ray {about['ray']}, and installed is Ray {installed}"
    return None


def _retrain(process: str) -> str:
    """Return how to get a policy that fits."""
    command = f"fedray agent train tune_configs/rl_{process}.yaml --out DIR"
    return f"train one with `{command}`, then give the folder DIR/policy"


def _digest(file: Path) -> str:
    return sha256(file.read_bytes()).hexdigest()
