"""What reads the files that fedray keeps, and reads again: checkpoints, runs, policies, what MLflow needs."""

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.fuzz.mutations import bytes_of, tree_of
from benchmarks.fuzz.target import Read, small_layout, small_masks, small_weights

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


def checkpoint_bytes(folder: Path) -> Read:
    from fedray.storage import checkpoint

    seeds = [_small_checkpoint(folder).read_bytes()]
    file = folder / checkpoint.name_of(1)

    def read(random: Random) -> None:
        data = bytes_of(random, seeds)
        file.write_bytes(data)
        checkpoint.read(file)
        assert data in seeds, "a checkpoint whose bytes had changed was read"

    return read


def sealed_checkpoints(folder: Path) -> Read:
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
        layout = small_layout()
        masks = small_masks(layout)
        memory: dict[str, Any] = {
            "tensor": torch.arange(6).reshape(2, 3).T,
            "array": np.arange(3.0),
            "mixed": [1, -(2**70), 0.5, float("nan"), None, True, "text", b"bytes", (1, 2), {3, 4}, 1 + 2j],
            "params": small_weights(layout),
        }
        state = ServerState(params=small_weights(layout), mask=masks[1], round=3, memory=memory)
        made = Checkpoint(state, {0: memory, 5: {"n": 1}}, {0: masks[1].digest}, {"bytes/up": 5.0}, True)
        checkpoint.write(path, made, {"method": {"name": "fedavg"}, "rounds": 3})
    return path


def files(name: str) -> Callable[[Path], Read]:
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


def models(folder: Path) -> Read:
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


def lines(folder: Path) -> Read:
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


def _write_sealed(file: Path, tree: Any) -> bool:
    """Write a mapping as JSON, with its checksum; tell whether it can be written."""
    from fedray.durable import as_mapping

    try:
        file.write_bytes(as_mapping(tree) if isinstance(tree, dict) else json.dumps(tree).encode())
    except (TypeError, ValueError):  # numbers of more digits than Python writes
        return False
    return True


def policies(folder: Path) -> Read:
    """Damage the folder of a trained policy; or its parts are whole, but another program wrote them."""
    from hashlib import sha256

    import numpy as np
    import torch

    from fedray.policies.network import Network
    from fedray.policies.trained import NETWORK, PolicyInterface, TrainedPolicy, save

    generator = torch.Generator().manual_seed(0)
    shapes = {"encoder": ((4, 2), (3, 4)), "head": ((2, 3),), "value": ((1, 3),)}
    layers = {
        part: [
            (torch.randn(size, generator=generator), torch.randn(size[0], generator=generator))
            for size in sizes
        ]
        for part, sizes in shapes.items()
    }
    interface = PolicyInterface("toy", 1, 2, ("more", "less"))
    about = {"process": "toy", "version": 1, "features": 2, "actions": ["more", "less"], "algorithm": "dqn"}
    place = folder / "policy"
    save(Network(layers), place, about)
    file, network = place / "policy.json", place / NETWORK
    texts = [file.read_bytes()]
    trees = [{key: value for key, value in json.loads(texts[0]).items() if key != "checksum"}]
    networks = [network.read_bytes(), Network({k: v for k, v in layers.items() if k != "value"}).save()]
    known = set(networks)

    def read(random: Random) -> None:
        data, how = random.choice(networks), random.randrange(4)
        if how < 2:
            data = bytes_of(random, networks)
        network.write_bytes(data)
        if how == 0:  # as it was written: a digest tells
            file.write_bytes(texts[0])
        elif how == 1:  # the digest is that of the damaged network
            _write_sealed(file, trees[0] | {"files": {NETWORK: sha256(data).hexdigest()}})
        elif how == 2:
            file.write_bytes(bytes_of(random, texts))
        elif not _write_sealed(file, tree_of(random, trees)):
            return
        policy = TrainedPolicy.load(place, interface)
        assert how != 0 or data in known, "a network whose bytes had changed was read"
        assert policy.act(np.ones(2, dtype=np.float32)) in (0, 1)

    return read


def tracked(folder: Path) -> Read:
    """Damage what a run keeps for MLflow and for its resume; or another program wrote it."""
    from fedray.config.trust import IMPORTS
    from fedray.durable import as_lines
    from fedray.experiment.resuming import REGISTERED, resumed_config
    from fedray.publishing.publisher import PUBLISHED, Known
    from fedray.report.reading import store_of
    from fedray.storage.run_files import RunFiles
    from fedray.tracking.catching_up import config_of, ended_as, mend
    from fedray.tracking.data_inputs import DATA, DESCRIBED, dataset_inputs
    from fedray.tracking.sent import SENT, SentPoints
    from fedray.tracking.tracked import KNOWN, Tracking, open_tracker
    from rllib_pruner.files import TrainFiles

    path = _run(folder)
    files = RunFiles(path)
    config = config_of(files)
    data = files.read_json(DATA)
    assert data is not None
    uri = f"sqlite:///{folder}/mlflow.db"
    wholes: dict[str, dict[str, Any]] = {
        KNOWN: {"uri": uri, "experiment_id": "1", "run_id": "a1", "parent": "b2", "is_complete": True},
        DATA: data,
        IMPORTS: {str(folder / "mine.py"): "0" * 64},
        REGISTERED: {"method.name": ["fedmef", "mine"]},
        PUBLISHED: {"place": "s3://a/b", "generation": 3, "id": "ab", "pending": "", "before": ["c"]}
        | {"is_partial": False, "files": {"config.yaml": [10, "0" * 64]}},
    }
    wholes[SENT] = {}
    lines = [{"mark": "m"}, {"step": 1, "time_ms": 5, "metrics": {"a": 0.5, "b": 1.0}}]
    originals = {name: (path / name).read_bytes() if (path / name).is_file() else None for name in wholes}

    def sent() -> None:
        SentPoints(path / SENT).sending(1, {"a": 0.5, "c": 2.0})

    ways: dict[str, tuple[Callable[[], object], ...]] = {
        KNOWN: (
            lambda: store_of(path),
            lambda: open_tracker(config, files, Tracking()),
            lambda: mend(files, config, Tracking()),
            lambda: TrainFiles(path).run_id(),
        ),
        DATA: (lambda: dataset_inputs(DESCRIBED.read(path) or data),),
        IMPORTS: (lambda: config_of(files), lambda: resumed_config(files)),
        REGISTERED: (lambda: resumed_config(files),),
        PUBLISHED: (lambda: Known.read(path),),
        SENT: (sent,),
    }

    def read(random: Random) -> None:
        name = random.choice((KNOWN, KNOWN, DATA, IMPORTS, REGISTERED, PUBLISHED, SENT, SENT, SENT))
        file = path / name
        try:
            if name == SENT:
                some: list[Any] = (
                    [tree_of(random, lines) for _ in range(2)] if random.random() < 0.5 else lines
                )
                if not all(isinstance(line, dict) for line in some):
                    return
                whole = as_lines(some)
                file.write_bytes(whole if random.random() < 0.5 else bytes_of(random, [whole]))
            elif random.random() < 0.3:
                _write_sealed(file, wholes[name])
                file.write_bytes(bytes_of(random, [file.read_bytes()]))
            elif not _write_sealed(file, tree_of(random, [wholes[name]])):
                return
            random.choice(ways[name])()
            ended_as(files)
        finally:
            original = originals[name]
            file.unlink(missing_ok=True) if original is None else file.write_bytes(original)

    return read


class _One:
    """Objects of a store, of which one has an odd content."""

    place = "s3://bucket/run"

    def __init__(self) -> None:
        self.content = b""

    def get(self, name: str) -> bytes:
        return self.content


def manifests(folder: Path) -> Read:
    """Damage the manifest of a published directory; or another program wrote it."""
    from fedray.durable import as_mapping
    from fedray.publishing.manifest import Entry, Manifest
    from fedray.publishing.manifest import read as read_manifest

    whole = Manifest(3, "abc", {"config.yaml": Entry(10, "0" * 64), "checkpoints/a": Entry(5, "1" * 64)})
    seeds = [whole.write()]
    trees = [{key: value for key, value in json.loads(seeds[0]).items() if key != "checksum"}]
    objects: Any = _One()

    def read(random: Random) -> None:
        if random.random() < 0.5:
            objects.content = bytes_of(random, seeds)
        else:
            tree = tree_of(random, trees)
            try:
                objects.content = as_mapping(tree) if isinstance(tree, dict) else json.dumps(tree).encode()
            except (TypeError, ValueError):
                return
        found = read_manifest(objects)
        assert type(found.generation) is int
        for name, entry in found.files.items():
            assert type(name) is str and type(entry.size) is int and type(entry.sha256) is str

    return read
