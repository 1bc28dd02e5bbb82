"""Where a run's numbers come from: the tags and the declared settings that are recorded with them."""

import subprocess
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedray.config.run_config import RunConfig


def declared(config: "RunConfig") -> dict[str, str | float]:
    """Return the further settings that matter in comparisons; in `result.json`, and among the tags.

    `norm`, the policy for batch normalisation; `zero_policy`, what clients do with pruned weights;
    `server_data`, the share of the training examples that the server trains on; `precision`, that of
    training; `client_accuracy`, the examples on which `clients/accuracy_*` are measured.
    """
    method = config.method.options
    return {
        "norm": config.norm,
        "weight_standardization": config.standardizes,
        "zero_policy": method.zero_policy,
        "precision": config.train.precision,
        "client_accuracy": "held-out examples" if config.data.client_test_fraction else "training examples",
        "server_data": config.data.server_fraction if method.uses_server_data else 0.0,
    }


def run_tags(*, method: str, dataset: str, model: str, digest: str, **more: object) -> dict[str, str]:
    """Return the tags that identify a run; `git_revision` only inside a git checkout.

    Args:
        method: name of the method.
        dataset: name of the data set.
        model: name of the model.
        digest: `RunConfig.digest`, as in `result.json`.
        **more: the result of `declared`.
    """
    tags = {"method": method, "dataset": dataset, "model": model, "config_digest": digest}
    tags |= {name: str(value) for name, value in more.items()}
    tags["fedray_version"] = metadata.version("fedray")
    revision = git_revision()
    return tags if revision is None else tags | {"git_revision": revision}


def git_revision() -> str | None:
    """Return the commit of the package's checkout, or else of the working directory's; None without any.

    Ends in `-dirty` if tracked files have changed since.
    """
    # of the commit, never of a tag; without git's lock, since another git may be at work here
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    for folder in (Path(__file__).parent, Path.cwd()):
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=5)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if done.returncode == 0:
            return done.stdout.strip()
    return None
