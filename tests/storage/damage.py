"""Ways in which a file of a run may be damaged, each under a name."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Spoil = Callable[[Path], None]
"""Damages the file at a path."""


def damages(path: Path, seed: int, count: int) -> Iterator[tuple[str, Spoil]]:
    """Yield ways to damage a file: cuts and flipped bits drawn anew for each seed, and what else happens.

    Args:
        path: the whole file.
        seed: of the places.
        count: cuts and flips, each.
    """
    data, rng = path.read_bytes(), np.random.default_rng(seed)
    size = len(data)
    if not size:
        return
    for place in sorted({0, 1, size - 1, *rng.integers(0, size, count).tolist()}):
        yield f"cut after {place} of {size} bytes", _written(data[:place])
    for place, bit in zip(rng.integers(0, size, count), rng.integers(0, 8, count), strict=True):
        flipped = bytes([data[place] ^ 1 << int(bit)])
        yield f"bit {bit} of byte {place} flipped", _written(data[:place] + flipped + data[place + 1 :])
    yield from _contents(data, rng)
    yield from _lines(data, rng)
    yield "deleted", Path.unlink
    yield "a directory", _directory
    yield "a link to nowhere", _dangling
    if os.geteuid() != 0:  # root may read everything
        yield "no permission", lambda file: file.chmod(0)


def _contents(data: bytes, rng: np.random.Generator) -> Iterator[tuple[str, Spoil]]:
    """Yield other contents."""
    size, place = len(data), int(rng.integers(0, len(data)))
    for name, content in {
        "garbage": rng.bytes(200),
        "garbage in it": data[:place] + rng.bytes(20) + data[place + 20 :],
        "zeros at its end": data + bytes(100),
        "zeros for its second half": data[: size // 2] + bytes(size - size // 2),
        "not UTF-8": b"\xff\xfe\xfa",
        "null": b"null\n",
        "a list": b"[1, 2]\n",
        "a mapping": b"{}\n",
        "a number": b"7\n",
        "twice": data + data,
    }.items():
        yield name, _written(content)


def _lines(data: bytes, rng: np.random.Generator) -> Iterator[tuple[str, Spoil]]:
    """Yield other lines, if the file has several."""
    lines = data.splitlines(keepends=True)
    if len(lines) < 2 or b"\0" in data:
        return
    line = int(rng.integers(0, len(lines)))
    for name, some in {
        f"line {line} of {len(lines)} missing": lines[:line] + lines[line + 1 :],
        f"line {line} of {len(lines)} doubled": lines[: line + 1] + lines[line:],
        f"cut after line {line} of {len(lines)}": lines[:line],
        f"lines from {line} of {len(lines)} first": lines[line:] + lines[:line],
    }.items():
        if some != lines:
            yield name, _written(b"".join(some))


def _written(content: bytes) -> Spoil:
    def write(path: Path) -> None:
        path.unlink()  # it may be a hard link
        path.write_bytes(content)

    return write


def _directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _dangling(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def copied(folder: Path, to: Path) -> Path:
    """Return a fresh copy of a folder."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))
