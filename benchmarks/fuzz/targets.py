"""What reads inputs from elsewhere: each target makes an input from a generator and hands it to a reader.

A target returns if the input was read, and may raise the errors that its reader declares. Anything else is a
fault, also a second and 256 MiB of memory.
"""

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.mutations import bytes_of, text_of, tree_of
from fedray.errors import ConfigError, DataError, FedrayError, RunError, WireError

Read = Callable[[Random], object]
"""Makes an input and reads it."""


@dataclass(frozen=True)
class Target:
    """A reader of inputs.

    Args:
        share: of all inputs, in thousandths.
        make: returns the function that makes and reads an input; given a folder in which it may write.
        declared: errors that the reader may raise.
    """

    share: int
    make: Callable[[Path], Read]
    declared: tuple[type[Exception], ...]


@contextmanager
def workplace() -> Iterator[Path]:
    """Yield a folder, in memory where there is one."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(
        prefix="fedray-fuzz-", dir=memory if memory.is_dir() else None
    ) as folder:
        yield Path(folder)


# ── payloads
# ──────────────────────────────────────────────────────────────────────────────────────────


def _layout() -> Any:
    from fedray.types import Layout

    return Layout(("a", "b"), ((10, 14), (60,)), (True, True), (True, True))


def _masks(layout: Any) -> list[Any]:
    import torch

    from fedray.types import Mask

    generator = torch.Generator().manual_seed(0)
    flats = [torch.rand(layout.size, generator=generator) < share for share in (0.4, 0.5, 0.03)]
    flats.append(torch.arange(layout.size) // 50 % 2 == 0)
    return [Mask.full(layout), *(Mask(flat, layout) for flat in flats)]


def _weights(layout: Any) -> Any:
    import torch

    from fedray.types import Params

    return Params(torch.randn(layout.size, generator=torch.Generator().manual_seed(1)), layout)


def _payloads(folder: Path) -> Read:
    import torch

    from fedray.costs.codec import Codec

    layout = _layout()
    masks, weights = _masks(layout), _weights(layout)
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

    layout = _layout()
    masks = _masks(layout)
    seeds = [encode_mask(mask, masks[1].digest) for mask in masks]
    known = {masks[1].digest: masks[1]}

    def read(random: Random) -> None:
        assert decode_mask(bytes_of(random, seeds), layout, known).layout == layout

    return read


def _updates(folder: Path) -> Read:
    from fedray.costs.differences import CODECS, DeltaCodec, decode_update, encode_update

    layout = _layout()
    masks, weights = _masks(layout), _weights(layout)
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


# ── checkpoints, and the files of a run
# ──────────────────────────────────────────────────────────────────────────────────────────


def _run(folder: Path) -> Path:
    """Make a small run with all its files; once for a folder."""
    import logging

    import fedray

    path = folder / "run"
    if not path.exists():
        logging.disable(logging.CRITICAL)
        fedray.run(
            {
                "rounds": 3,
                "model": "mlp",
                "data": {"name": "digits"},
                "clients": {"population": 6, "cohort": 3, "actors": 0, "sampler": {"name": "oort"}},
                "method": {"name": "fedmef", "batch_size": 50},
                "tracking": {"uri": "none"},
            },
            out=path,
            progress=False,
        )
    return path


def _checkpoint_bytes(folder: Path) -> Read:
    from fedray.storage import checkpoint

    seeds = [_small_checkpoint(folder).read_bytes()]
    file = folder / checkpoint.name_of(1)

    def read(random: Random) -> None:
        data = bytes_of(random, seeds)
        file.write_bytes(data)
        checkpoint.read(file)
        assert data in seeds, "a checkpoint whose bytes had changed was read"

    return read


def _sealed_checkpoints(folder: Path) -> Read:
    """Checkpoints whose checksums are right, but whose JSON another program wrote."""
    from fedray.storage import checkpoint

    whole = _small_checkpoint(folder).read_bytes()
    first, _, rest = whole.partition(b"\n")
    length = int(first.split()[-1])
    seeds, buffers = [json.loads(rest[:length])], rest[length:]
    file = folder / checkpoint.name_of(2)

    def read(random: Random) -> None:
        try:
            head = json.dumps(tree_of(random, seeds)).encode()
        except ValueError:  # numbers of more digits than Python writes
            return
        digest = checkpoint._digest(checkpoint.FORMAT, head)
        begin = f"fedray checkpoint {checkpoint.FORMAT} {digest} {len(head)}\n".encode()
        file.write_bytes(begin + head + buffers)
        checkpoint.read(file)

    return read


def _small_checkpoint(folder: Path) -> Path:
    """Write a checkpoint of a few hundred bytes with values of every kind."""
    import numpy as np
    import torch

    from fedray.federation.server import Checkpoint
    from fedray.storage import checkpoint
    from fedray.types import ServerState

    path = folder / "seed.checkpoint"
    if not path.exists():
        layout = _layout()
        masks = _masks(layout)
        memory: dict[str, Any] = {
            "tensor": torch.arange(6).reshape(2, 3).T,
            "array": np.arange(3.0),
            "mixed": [1, -(2**70), 0.5, float("nan"), None, True, "text", b"bytes", (1, 2), {3, 4}, 1 + 2j],
            "params": _weights(layout),
        }
        state = ServerState(params=_weights(layout), mask=masks[1], round=3, memory=memory)
        made = Checkpoint(state, {0: memory, 5: {"n": 1}}, {0: masks[1].digest}, {"bytes/up": 5.0}, True)
        checkpoint.write(path, made, {"method": {"name": "fedavg"}, "rounds": 3})
    return path


def _files(name: str) -> Callable[[Path], Read]:
    """Return a target that damages one file of a run's directory and reads the directory in every way."""

    def make(folder: Path) -> Read:
        from fedray.overview.summary import summary
        from fedray.report.reading import load_run
        from fedray.storage.run_files import RunFiles

        path = _run(folder)
        original = (path / name).read_bytes()
        files = RunFiles(path)
        ways: list[Callable[[], object]] = [
            lambda: load_run(path),
            files.rounds,
            files.result,
            files.read_config,
        ]

        def read(random: Random) -> None:
            (path / name).write_bytes(bytes_of(random, [original]))
            try:
                summary(path).to_json()  # never raises: a list of runs shows damaged ones
                random.choice(ways)()
            finally:
                (path / name).write_bytes(original)

        return read

    return make


def _models(folder: Path) -> Read:
    import torch

    from fedray.storage.final_model import load_model

    path = _run(folder)
    original = (path / "model.safetensors").read_bytes()
    weights = torch.cat([tensor.flatten() for tensor in load_model(path).parameters()])

    def read(random: Random) -> None:
        (path / "model.safetensors").write_bytes(bytes_of(random, [original]))
        try:
            found = torch.cat([tensor.flatten() for tensor in load_model(path).parameters()])
            assert torch.equal(found, weights), "a model whose weights had changed was read"
        finally:
            (path / "model.safetensors").write_bytes(original)

    return read


def _lines(folder: Path) -> Read:
    from fedray.durable import append_lines, read_lines, scan_lines

    file = folder / "lines.jsonl"
    append_lines(file, [{"round": n, "metrics": {"a": n / 3}, "notes": ["x" * n]} for n in range(6)])
    seeds = [
        file.read_bytes(),
        b'{"suggested": 3, "changes": {"a": 1}}\n{"told": 3, "values": {"b": null}}\n',
    ]

    def read(random: Random) -> None:
        file.write_bytes(bytes_of(random, seeds))
        scan_lines(file)
        read_lines(file)

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
    "payloads": Target(420, _payloads, (WireError,)),
    "masks": Target(100, _mask_bytes, (WireError,)),
    "updates": Target(100, _updates, (WireError,)),
    "checkpoints": Target(90, _checkpoint_bytes, (RunError,)),
    "sealed checkpoints": Target(40, _sealed_checkpoints, (RunError,)),
    "journals": Target(70, _lines, (RunError,)),
    "rounds.jsonl": Target(14, _files("rounds.jsonl"), (FedrayError,)),
    "result.json": Target(14, _files("result.json"), (FedrayError,)),
    "config.yaml": Target(5, _files("config.yaml"), (FedrayError,)),
    "client_accuracy.parquet": Target(8, _files("client_accuracy.parquet"), (FedrayError,)),
    "model.safetensors": Target(4, _models, (FedrayError,)),
    "sealed YAML": Target(10, _sealed_files, (RunError, ConfigError)),
    "YAML": Target(60, _yaml, (ConfigError,)),
    "arguments": Target(45, _overrides, (ConfigError,)),
    "configs": Target(17, _configs, INPUT),
    "sweeps": Target(3, _sweeps, INPUT),
}
"""Name → reader; the shares add up to a thousand."""
