"""From a module of RLlib to the network of a policy, which needs no RLlib.

    python -m rllib_pruner.networks FOLDER

converts a policy that an earlier version wrote, whose `module/` holds pickles. Reading them runs the code in
them: only convert policies that you trust.
"""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedray.durable import local_path, read_mapping
from fedray.errors import ConfigError, RunError
from fedray.policies.network import Layer, Network
from fedray.policies.trained import FORMAT, save


def network_of(module: Any) -> Network:
    """Return a copy of the network of RLlib's default DQN or PPO module with hidden layers of ReLU.

    Raises:
        TypeError: if it has another architecture.
    """
    actor = module.encoder
    for name in ("actor_encoder", "encoder"):  # of PPO
        if getattr(actor, name, None) is not None:
            actor = getattr(actor, name)
            break
    if hasattr(module, "pi"):
        return Network({"encoder": _layers(actor), "head": _layers(module.pi)})
    value = _layers(module.vf) if module.uses_dueling else []
    return Network({"encoder": _layers(actor), "head": _layers(module.af), "value": value})


def _layers(part: Any) -> list[Layer]:
    from torch import nn

    layers: list[Layer] = []
    for layer in part.net.mlp:
        if isinstance(layer, nn.Linear):
            layers.append((layer.weight.detach().cpu().clone(), layer.bias.detach().cpu().clone()))
        elif not isinstance(layer, nn.ReLU):
            raise TypeError(f"a policy's network has linear layers and ReLU, not {type(layer).__name__}")
    return layers


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


def convert(folder: Path) -> None:
    """Write a policy of format 1, whose module is a pickle, in today's format. It runs code in the pickle.

    Raises:
        ConfigError: if the folder holds no such policy.
    """
    try:
        about = read_mapping(folder / "policy.json")
    except RunError as error:
        raise ConfigError(str(error)) from None
    if about is None:
        raise ConfigError(f"{folder}: is not the folder of a policy: it has no policy.json")
    if about.get("format") != 1:
        raise ConfigError(f"{folder}: has format {about.get('format')!r}; only format 1 is converted")
    with quiet():
        from ray.rllib.core.rl_module.rl_module import RLModule
    with quiet():  # once more: Ray sets its loggers' levels when it is imported
        try:
            module = RLModule.from_checkpoint(str((folder / "module").resolve()))
        except Exception as error:  # a pickle may raise anything
            raise ConfigError(
                f"{folder / 'module'}: cannot be read: {error}; restore it from a copy"
            ) from error
    save(network_of(module), folder, {k: v for k, v in about.items() if k not in ("format", "files")})


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m rllib_pruner.networks FOLDER (of a policy)")
    try:
        convert(local_path(sys.argv[1]))
    except ConfigError as error:
        sys.exit(str(error))
    sys.stdout.write(f"{sys.argv[1]}: converted to format {FORMAT}\n")
