"""What reads inputs from elsewhere: each target makes an input from a generator and hands it to a reader.

A target returns if the input was read, and may raise the errors that its reader declares. Anything else is a
fault, also a second and 256 MiB of memory.
"""

from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz import kept
from benchmarks.fuzz.mutations import bytes_of, text_of, tree_of
from benchmarks.fuzz.target import Read, Target, small_layout, small_masks, small_weights
from fedray.errors import ConfigError, DataError, FedrayError, RunError, WireError

# ── payloads
# ──────────────────────────────────────────────────────────────────────────────────────────


def _payloads(folder: Path) -> Read:
    import torch

    from fedray.costs.codec import Codec

    layout = small_layout()
    masks, weights = small_masks(layout), small_weights(layout)
    extras = {
        "loss": 0.5,
        "n": 3,
        "name": "a",
        "on": True,
        "t": torch.arange(4),
        "h": torch.ones(2, 2).half(),
    }
    beside_them: list[dict[str, Any]] = [{}, extras]
    kinds: list[tuple[Any, bool]] = [("fp32", False), ("fp16", True), ("int8", False), ("int8", True)]
    seeds = [
        Codec(kind, exact).encode(weights, mask, known=masks[1].digest, extras=beside)
        for kind, exact in kinds
        for mask in masks
        for beside in beside_them
    ]
    codec, known = Codec(), {masks[1].digest: masks[1]}

    def read(random: Random) -> None:
        decoded = codec.decode(bytes_of(random, seeds), layout, known=known)
        assert decoded.params.layout == decoded.mask.layout == layout
        assert not decoded.params.flat[~decoded.mask.flat].any()

    return read


def _mask_bytes(folder: Path) -> Read:
    from fedray.costs.codec import decode_mask, encode_mask

    layout = small_layout()
    masks = small_masks(layout)
    seeds = [encode_mask(mask, masks[1].digest) for mask in masks]
    known = {masks[1].digest: masks[1]}

    def read(random: Random) -> None:
        assert decode_mask(bytes_of(random, seeds), layout, known).layout == layout

    return read


def _updates(folder: Path) -> Read:
    from fedray.costs.differences import CODECS, DeltaCodec, decode_update, encode_update

    layout = small_layout()
    masks, weights = small_masks(layout), small_weights(layout)
    made = [kind() for kind in CODECS.values()]
    codecs = [codec for codec in made if isinstance(codec, DeltaCodec)]
    seeds = {
        codec: [encode_update(codec, weights, mask, masks[1].digest, {"n": 1}) for mask in masks]
        for codec in codecs
    }

    def read(random: Random) -> None:
        codec = random.choice(codecs)
        decode_update(codec, bytes_of(random, seeds[codec]), layout, masks[1])

    return read


# ── configs
# ──────────────────────────────────────────────────────────────────────────────────────────


def _texts() -> list[str]:
    from fedray.config.shipped import templates

    return [path.read_text(encoding="utf-8")[:1500] for path in templates().values()]


def _yaml(folder: Path) -> Read:
    from fedray.config import yaml_text

    seeds = [*_texts(), "a: &a {b: 1}\nc: {<<: *a, d: [*a, *a]}\n", "{a: 1, b: [1, {c: .nan}], 'd e': ~}"]
    short = [text[:300] for text in seeds]

    def read(random: Random) -> None:
        yaml_text.parse(text_of(random, short), "input")

    return read


def _trees(folder: Path) -> list[dict[str, Any]]:
    from fedray.config import yaml_text
    from fedray.config.run_config import RunConfig
    from fedray.config.shipped import templates

    trees: list[dict[str, Any]] = [RunConfig().to_tree()]
    for path in templates().values():
        tree = yaml_text.load(path)
        base = tree.get("base", tree)
        if "process" not in base:
            trees.append(base)
    return trees


def _configs(folder: Path) -> Read:
    from fedray.config.run_config import RunConfig

    seeds = _trees(folder)
    for tree in seeds:  # the first config of a kind imports torch and builds its model
        RunConfig.from_tree(tree)

    def read(random: Random) -> None:
        config = RunConfig.from_tree(tree_of(random, seeds), "input")
        again = RunConfig.from_tree(config.to_tree(), "again")
        assert again.digest == config.digest

    return read


def _sealed_files(folder: Path) -> Read:
    from fedray.config import sealed

    file = folder / "sealed.yaml"
    written = _trees(folder)[1]
    sealed.write(file, written)
    seeds = [file.read_bytes()]

    def read(random: Random) -> None:
        file.write_bytes(bytes_of(random, seeds))
        assert sealed.load(file) == written

    return read


def _overrides(folder: Path) -> Read:
    from fedray.config.overrides import override_tree, parse_overrides

    seeds = [
        *("method.lr=0.1", "clients={cohort: 3, devices: {phone: 1.0}}", "tune.stop={val/accuracy: 0.9}"),
        *("method={name: snip, density: 0.2}", "tracking.uri=http://me:pw@host:1/a", "a.b.c=[1, 2, {d: e}]"),
        *("seed=1", "space.method.lr={loguniform: [0.01, 0.3]}", "imports=[a.py, b.py]"),
    ]
    tree = {"method": {"name": "fedavg", "lr": 0.1}, "clients": {"cohort": 1}, "seed": 0}

    def read(random: Random) -> None:
        override_tree(tree, parse_overrides([text_of(random, seeds) for _ in range(random.randint(1, 3))]))

    return read


def _sweeps(folder: Path) -> Read:
    from fedray.sweeps.space import Sweep

    base = {"rounds": 3, "model": "mlp", "data": {"name": "digits"}, "method": {"name": "fedavg"}}
    space = {
        "method.lr": {"loguniform": [0.01, 0.3]},
        "method": {"grid": [{"name": "snip"}, {"name": "fedavg"}]},
    }
    tune = {
        "search": {"name": "random"},
        "num_samples": 3,
        "stop": {"val/accuracy": 0.9},
        "objectives": {"val/accuracy": "max", "total/bytes/up": "min"},
        "constraints": {"density/global": "<= 0.1"},
        "repeat": [0, 1],
        "points_to_evaluate": [{"method.lr": 0.1, "method": {"name": "snip"}}],
    }
    seeds: list[dict[str, Any]] = [
        {"base": base, "space": space, "tune": tune},
        {"base": base, "space": {"seed": {"grid": [0, 1]}}, "tune": {"scheduler": {"name": "asha"}}},
        {
            "base": base,
            "space": {"seed": {"grid": [0, 1]}},
            "tune": {"scheduler": "hyperband", "concurrent": 2},
        },
    ]

    for tree in seeds:
        Sweep.read(tree, "input", "input", {})

    def read(random: Random) -> None:
        tree = tree_of(random, seeds)
        if isinstance(tree, dict):
            Sweep.read(tree, "input", "input", {})

    return read


INPUT = (ConfigError, DataError)
TARGETS: dict[str, Target] = {
    "payloads": Target(390, _payloads, (WireError,)),
    "masks": Target(100, _mask_bytes, (WireError,)),
    "updates": Target(100, _updates, (WireError,)),
    "checkpoints": Target(90, kept.checkpoint_bytes, (RunError,)),
    "sealed checkpoints": Target(40, kept.sealed_checkpoints, (RunError,)),
    "journals": Target(70, kept.lines, (RunError,)),
    "rounds.jsonl": Target(14, kept.files("rounds.jsonl"), (FedrayError,)),
    "result.json": Target(14, kept.files("result.json"), (FedrayError,)),
    "config.yaml": Target(5, kept.files("config.yaml"), (FedrayError,)),
    "client_accuracy.parquet": Target(8, kept.files("client_accuracy.parquet"), (FedrayError,)),
    "model.safetensors": Target(4, kept.models, (FedrayError,)),
    "policies": Target(17, kept.policies, (ConfigError,)),
    "MLflow's files": Target(4, kept.tracked, (FedrayError,)),
    "manifests": Target(9, kept.manifests, (RunError,)),
    "sealed YAML": Target(10, _sealed_files, (RunError, ConfigError)),
    "YAML": Target(60, _yaml, (ConfigError,)),
    "arguments": Target(45, _overrides, (ConfigError,)),
    "configs": Target(17, _configs, INPUT),
    "sweeps": Target(3, _sweeps, INPUT),
}
"""Name → reader; the shares add up to a thousand."""
