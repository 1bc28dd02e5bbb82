"""The final weights of small runs: `python -m tests.sums` prints a JSON object, name → SHA-256.

Run it in a separate process, with `ENVIRONMENT`: matrix products and convolutions then take the same steps
on every processor. `fingerprint` tells whether they do on this one.
"""

import json
import sys
import tempfile
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
"""Environment variables under which torch's kernels do not depend on the processor."""

BASE: dict[str, Any] = {
    "rounds": 4,
    "seed": 3,
    "model": "lenet5",
    "data": {
        "name": "digits",
        "partition": {"kind": "dirichlet", "alpha": 0.5},
        "server_fraction": 0.05,
    },
    "clients": {"population": 12, "cohort": 4, "actors": 0},
    "tracking": {"uri": "none"},
}

METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "fedavg momentum": {"name": "fedavg", "momentum": 0.9, "weight_decay": 1e-4, "lr_decay": 0.9},
    "fedavg adam": {"name": "fedavg", "optimizer": "adam", "lr": 0.002, "local_epochs": 2},
    "fedavg int8": {"name": "fedavg", "uplink_values": "int8", "downlink_values": "fp16", "steps": 3},
    "fedavg_server": {},
    "fedavg_small": {"density": 0.5},
    "fedavg_warm": {},
    "random_mask": {"density": 0.3},
    "staged": {"density": 0.2},
    "staged threshold": {"name": "staged", "threshold": 0.5},
    "staged gradient": {"name": "staged", "density": 0.2, "importance": "gradient", "schedule": "geometric"},
    "staged bandit": {"name": "staged", "policy": "bandit", "stages": 3},
    "staged agent": {"name": "staged", "policy": "agent", "stages": 3, "regrow_from": "shadow"},
    "snip": {"density": 0.2},
    "frlp": {},
    "frlp bisect": {"name": "frlp", "solver": "bisect", "single_shot": 0.4},
    "prunefl": {},
    "autoflip": {},
    "fedlp": {},
    "pqsu": {"density": 0.5},
    "ceafl": {},
    "fedmef": {"density": 0.3},
    "heterofl": {"levels": "a-b-d"},
    "fedrolex": {"levels": "b-c"},
}
"""Name of a sum → options of the method; the name is the method's unless they have one."""

VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {"model": "mlp", "method": {"name": "fedavg"}},
    "mlp masked": {"model": "mlp", "method": {"name": "random_mask", "density": 0.1}},
    "cnn channels": {"model": "cnn", "rounds": 2, "method": {"name": "pqsu", "density": 0.3}},
    "last layer": {"prune_last": True, "prune_first": False, "method": {"name": "snip", "density": 0.3}},
    "late and dropped": {
        "clients": {"deadline_s": 0.3, "dropout": 0.2, "over_selection": 0.5, "devices": {"phone": 1.0}},
        "method": {"name": "staged", "density": 0.3},
    },
    "stacked": {"clients": {"stack": 3}, "method": {"name": "random_mask", "density": 0.3, "momentum": 0.5}},
    "chunks": {"clients": {"chunk": 2}, "data": {"partition": {"kind": "iid"}}},
    "hetero": {
        "model": "fedlp_cnn_exits",
        "rounds": 2,
        "method": {"name": "fedlp", "mode": "hetero", "steps": 3},
    },
    "slices": {
        "model": "fedlp_cnn",
        "rounds": 2,
        "norm": "static",
        "method": {"name": "heterofl", "levels": "c-e", "steps": 3, "momentum": 0.9},
    },
    **{
        f"norm {norm}": {
            "model": "fedlp_cnn",
            "rounds": 2,
            "norm": norm,
            "method": {"name": "staged", "steps": 3},
        }
        for norm in ("average", "local", "static", "group")
    },
}
"""Name of a sum → what it changes in BASE."""


def configs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the nested config of each run."""
    for name, options in METHODS.items():
        yield name, BASE | {"method": {"name": name, "batch_size": 20, "lr": 0.1} | options}
    for name, changes in VARIANTS.items():
        tree = BASE | {"method": {"name": "fedavg"}}
        for key, value in changes.items():
            tree[key] = tree[key] | value if isinstance(value, dict) and key != "method" else value
        yield name, tree


def fingerprint() -> str:
    """Return a digest (hex) of what this process computes: products, convolutions, exponentials and sums."""
    import numpy as np
    import torch
    from torch.nn import functional as F

    rng = np.random.default_rng(0)
    x = torch.from_numpy(rng.standard_normal((20, 3, 12, 12), dtype=np.float32)).requires_grad_()
    w = torch.from_numpy(rng.standard_normal((16, 3, 5, 5), dtype=np.float32)).requires_grad_()
    m = torch.from_numpy(rng.standard_normal((1024, 100), dtype=np.float32)).requires_grad_()
    hidden = F.max_pool2d(F.relu(F.conv2d(x, w)), 2).flatten(1)
    loss = F.cross_entropy(hidden[:, :100] @ m.T[:, :100], torch.arange(20) % 10)
    loss = loss + (hidden @ m[: hidden.shape[1]]).square().mean() + hidden.std()
    grads = torch.autograd.grad(loss, [x, w, m])
    digest = sha256(b"".join(grad.numpy().tobytes() for grad in grads))
    digest.update(np.exp(m.detach().numpy()).sum(axis=0).tobytes())
    return digest.hexdigest()[:16]


def main() -> None:
    """Print the fingerprint and all sums."""
    import fedray
    from fedray.config.run_config import RunConfig

    only = set(sys.argv[1:])
    sums = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, tree) in enumerate(configs()):
            if not only or name in only:
                config = RunConfig.from_tree(tree)
                sums[name] = fedray.run(config, out=Path(folder) / str(number)).weights_sha256
    sys.stdout.write(json.dumps({"fingerprint": fingerprint(), "sums": sums}, indent=2) + "\n")


if __name__ == "__main__":
    main()
