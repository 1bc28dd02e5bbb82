"""Where a run's numbers come from: the tags and the declared settings that are recorded with them."""

import platform
import re
import subprocess
from functools import cache
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


VERSIONED = ("fedray", "torch", "numpy")
"""Packages whose versions are recorded with a run."""

BITS = ("processor", "torch", "numpy")
"""Of what `machine` returns, what must agree for two runs of one config to have the same bits."""


@cache
def machine() -> dict[str, str]:
    """Return what computes here: processor, versions and commit; `gpu` and `commit` where there is one.

    The processor is named by its model and the instruction set for which torch chooses its kernels: on
    another kind, sums are rounded differently.
    """
    import torch

    found = {
        "processor": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        **{package: metadata.version(package) for package in VERSIONED},
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    revision = git_revision()
    return found if revision is None else found | {"commit": revision}


def _processor() -> str:
    """Return the model of this machine's processor, as Linux names it; elsewhere as Python does."""
    try:
        text = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()


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
