"""A checkpoint as a file: all state that a run needs to continue, and the run that it belongs to.

    fedray checkpoint 1 <SHA-256> <length of the JSON>              the first line
    {"fedray": …, "config": …, "state": …, "buffers": …}        the JSON
    …                                                           the buffers, one after the other

Every byte is checked when the file is read: the JSON by the first line, each buffer by the SHA-256 that the
JSON has of it, and the length of the whole. No class is pickled (`values.py`).
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from struct import error as StructError
from typing import Any, BinaryIO

from fedray.config.trees import Tree
from fedray.durable import replacing
from fedray.errors import MethodError, RunError
from fedray.federation.server import Checkpoint
from fedray.storage.values import Checker, Reader, Unreadable, Unwritable, Writer
from fedray.types import Layout, ServerState

FORMAT = 1
"""Of the file; a reader refuses any other."""
SUFFIX = ".checkpoint"

_FIRST = re.compile(rb"fedray checkpoint ([1-9][0-9]{0,8}) ([0-9a-f]{64}) ([1-9][0-9]{0,17})\n")
_MALFORMED = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RuntimeError,
    StructError,
    TypeError,
    ValueError,
)
"""Errors of a reader whose JSON was written by another program, under a right checksum."""

_ZIP = b"PK\x03\x04"


class Damaged(RunError):
    """A checkpoint whose bytes have changed since it was written."""


@dataclass(frozen=True)
class Stored:
    """A checkpoint that was read, and the config that it belongs to.

    Args:
        path: its file.
        checkpoint: the checkpoint.
        config: the run's config, as a tree.
    """

    path: Path
    checkpoint: Checkpoint
    config: Tree

    @property
    def done(self) -> int:
        """The last complete round; 0 is the set-up."""
        return self.checkpoint.state.round - 1


def name_of(round: int) -> str:
    """Return the file name of the checkpoint before a round."""
    return f"round-{round:06d}{SUFFIX}"


def check(checkpoint: Checkpoint, method: str, clients: Collection[int] | None = None) -> None:
    """Refuse memories that a checkpoint cannot hold.

    Args:
        checkpoint: as it is after a round.
        method: name of the method, for the message.
        clients: ids of the clients whose memories are checked; None: all.

    Raises:
        MethodError: with the position and the type of the offending value.
    """
    _encode(Checker(), checkpoint, method, clients)


def write(path: Path, checkpoint: Checkpoint, config: Tree) -> None:
    """Write a checkpoint as a whole.

    Raises:
        MethodError: if a memory cannot be written.
        OSError: if the file cannot.
    """
    writer = Writer()
    contents = _encode(writer, checkpoint, str(config.get("method", {}).get("name", "the method")))
    head = json.dumps(
        {
            "fedray": metadata.version("fedray"),
            "config": config,
            **contents,
            "buffers": [
                [len(data), digest] for data, digest in zip(writer.buffers, writer.digests, strict=True)
            ],
        }
    ).encode()
    first = f"fedray checkpoint {FORMAT} {_digest(FORMAT, head)} {len(head)}\n"
    with replacing(path) as file:
        file.write(first.encode())
        file.write(head)
        for data in writer.buffers:
            file.write(data)


def _encode(
    writer: Writer, checkpoint: Checkpoint, method: str, clients: Collection[int] | None = None
) -> dict[str, Any]:
    contents: dict[str, Any] = {}
    try:
        contents["state"] = {
            field.name: writer.encode(getattr(checkpoint.state, field.name), f"state.{field.name}")
            for field in fields(ServerState)
        }
        contents["memories"] = [
            [client, writer.encode(memory, f"the memory of client {client}")]
            for client, memory in checkpoint.memories.items()
            if clients is None or client in clients
        ]
        contents["sampler"] = writer.encode(checkpoint.sampler, "the memory of the sampler")
    except Unwritable as error:
        raise MethodError(f"{method}: {error}") from None
    except RecursionError:
        raise MethodError(f"{method}: a memory is nested too deeply to be written") from None
    contents |= {
        name: writer.encode(getattr(checkpoint, name), name) for name in ("holds", "totals", "rounds_matter")
    }
    return contents


def read(path: Path) -> Stored:
    """Read a checkpoint and check every byte of it.

    Raises:
        Damaged: if a byte has changed.
        RunError: if it is whole, but of another version, or a class is not there any more; or if the file
            cannot be read.
    """
    try:
        with open(path, "rb") as file:
            return _read(path, file)
    except (IsADirectoryError, FileNotFoundError) as error:
        raise Damaged(f"{path}: cannot be read: {error.strerror}") from None
    except OSError as error:
        raise RunError(
            f"{path}: cannot be read: {error.strerror or error}; restore it from a copy, or move it "
            "elsewhere: then the checkpoint before it is used"
        ) from error
    except Unreadable as error:
        raise RunError(f"{path}: cannot be read: {error}") from None
    except _MALFORMED as error:
        raise Damaged(f"{path}: does not hold a checkpoint: {error!r:.200}") from None


def _read(path: Path, file: BinaryIO) -> Stored:
    head, place = _head(path, file)
    version = metadata.version("fedray")
    if head["fedray"] != version:
        raise RunError(f"{path}: was written by fedray {head['fedray']}, and this is fedray {version}")
    starts = [place]
    for length, _ in head["buffers"]:
        starts.append(starts[-1] + length)
    size = file.seek(0, 2)
    if size != starts[-1]:
        raise Damaged(f"{path}: is damaged: it has {size:,} bytes and had {starts[-1]:,}")

    def buffer(number: int) -> bytearray:
        length, digest = head["buffers"][number]
        data = bytearray(length)
        file.seek(starts[number])
        if file.readinto(data) != length or sha256(data).hexdigest() != digest:  # type: ignore[attr-defined]
            raise Damaged(f"{path}: is damaged: its SHA-256 does not match")
        return data

    reader = Reader(buffer)
    state = ServerState(**{name: reader.decode(node) for name, node in head["state"].items()})
    memories = {client: reader.decode(node) for client, node in head["memories"]}
    sampler = reader.decode(head.get("sampler"))  # absent in files written before there were samplers
    rest = {name: reader.decode(head[name]) for name in ("holds", "totals", "rounds_matter")}
    return Stored(path, Checkpoint(state, memories, **rest, sampler=sampler), head["config"])


def _head(path: Path, file: BinaryIO) -> tuple[dict[str, Any], int]:
    """Return the JSON, and where the buffers begin."""
    first = file.readline(200)
    if first.startswith(_ZIP):
        raise RunError(f"{path}: was written by fedray 0.1.0 in a format that this version does not read")
    match = _FIRST.fullmatch(first)
    if match is None:
        raise Damaged(f"{path}: is damaged: it does not begin as a checkpoint")
    given, length = int(match[1]), int(match[3])
    head = file.read(min(length, path.stat().st_size))
    if _digest(given, head) != match[2].decode():
        raise Damaged(f"{path}: is damaged: its SHA-256 does not match")
    if given != FORMAT:
        raise RunError(f"{path}: has format {given}, and this version reads {FORMAT}")
    return json.loads(head), len(first) + len(head)


def _digest(format: int, head: bytes) -> str:
    return sha256(b"%d\n%b" % (format, head)).hexdigest()


def difference(written: Layout, expected: Layout) -> str | None:
    """Return how the layout of a checkpoint differs from the model's, or None."""
    if written == expected:
        return None
    for name in (*expected.names, *written.names):
        was, now = written.shape_of.get(name), expected.shape_of.get(name)
        if was != now:
            return f"{name} is {was or 'absent'} in the checkpoint, {now or 'absent'} in the model"
    return "the model has its tensors in another order, or others of them may be pruned"
