"""Ways in which a file of a run may be damaged, each under a name; and all that reads the file then."""

import ctypes
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from typer.testing import CliRunner

from fedray import cli
from fedray.errors import FedrayError
from fedray.overview.comparing import sides_of, to_json
from fedray.overview.summary import plain, summaries
from fedray.overview.watching import look
from fedray.report.reading import find_runs, load_run
from fedray.report.table import comparison

COUNT = int(os.environ.get("FEDRAY_DAMAGES", "6"))
"""Cuts and flips of each file."""

BY_COMMAND = 10
"""One variant of so many is shown to the commands themselves; the others to what they call."""

TRIED = Counter[str]()
"""Damaged variants that were tried, by what was damaged; the last line of the tests has them."""

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
    yield "a link to itself", _looping
    yield "unreadable sectors", _failing
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


def _looping(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _failing(path: Path) -> None:
    """Let each read of a file fail, as on a broken disk."""
    path.unlink()
    path.symlink_to("/proc/self/mem")


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Sets(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("kept", ctypes.c_uint32))


@contextmanager
def as_any_user() -> Iterator[None]:
    """Let permissions count in this thread, also for root, who otherwise reads and writes everything."""
    if os.geteuid() != 0:
        yield
        return
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = _Header(0x20080522, 0), (_Sets * 2)()
    assert libc.capget(ctypes.byref(header), sets) == 0
    before = sets[0].effective
    sets[0].effective &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(ctypes.byref(header), sets) == 0
    try:
        yield
    finally:
        sets[0].effective = before
        assert libc.capset(ctypes.byref(header), sets) == 0


def copied(folder: Path, to: Path) -> Path:
    """Return a fresh copy of a folder."""
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


Look = Callable[[Path, Path], Any]
"""Folder, and another one → what a user sees of the first."""


def steady(value: Any) -> Any:
    """Return JSON without what depends on the moment and the place."""
    if isinstance(value, dict):
        return {k: steady(v) for k, v in value.items() if k not in ("when", "path", "paths", "name")}
    return [steady(inner) for inner in value] if isinstance(value, list) else value


def _report(place: Path, other: Path) -> Any:
    return comparison([load_run(path) for path in find_runs([place])]).to_csv()


LOOKS: dict[str, Look] = {
    "report": _report,
    "runs": lambda place, other: steady([one.to_json() for one in summaries([place])]),
    "compare": lambda place, other: steady(plain(to_json(sides_of([place, other])))),
    "watch": lambda place, other: steady(look(place).to_json()),
}
COMMANDS: dict[str, Callable[[Path, Path], list[Any]]] = {
    "report": lambda place, other: ["report", place, "--no-pictures", "--out", place.parent / "report"],
    "runs": lambda place, other: ["runs", place],
    "compare": lambda place, other: ["compare", place, other],
    "watch --once": lambda place, other: ["watch", place, "--once"],
}


def by_command(words: list[Any]) -> None:
    """Run a command.

    Raises:
        FedrayError: what it refuses.
    """
    done = CliRunner().invoke(cli.app, list(map(str, words)))
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception


def problem_of(seen: Any) -> str:
    """Return the problems that a list of runs, or a view of a run or a sweep, names."""
    runs = seen.get("trials", []) if isinstance(seen, dict) else seen
    damaged = [run for run in runs if isinstance(run, dict) and run.get("status") == "damaged"]
    return " ".join(str(run["problem"]) for run in damaged)


def names(message: str, file: str) -> bool:
    """Tell whether a message names a file, or the folder of files that it is a part of."""
    path = Path(file)
    parents = [parent for parent in path.parts[:-1] if "." in parent or parent == "policy"]
    return any(name in message for name in (path.name, *parents))


class Heard(logging.Handler):
    """The warnings of one variant."""

    text = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a warning."""
        self.text += f"{record.getMessage()}\n"


class Damaging:
    """Damages the files of a folder, and shows it to all that read it.

    Args:
        whole: the sound folder.
        other: a run to compare it with.
        to: where copies are damaged.
        resumed: resumes a copy whose named file was damaged; returns what is wrong with it then.
    """

    def __init__(
        self, whole: Path, other: Path, to: Path, resumed: Callable[[Path, str], str | None]
    ) -> None:
        self.whole, self.other, self.place, self.resumed = whole, other, to / whole.name, resumed
        self.count, self.wrong, self.heard = 0, list[str](), Heard()
        copied(whole, self.place)
        self.expected = {name: self.seen(see) for name, see in LOOKS.items()}

    def seen(self, see: Look) -> Any:
        """Return what is seen; a refusal as text."""
        try:
            return see(self.place, self.other)
        except FedrayError as error:
            return f"refused: {error}"

    def all(self, pattern: str = "**/*") -> None:
        """Damage each file that fits a pattern in every way."""
        files = sorted(path for path in self.whole.glob(pattern) if path.is_file() and path.name != ".lock")
        logging.getLogger("fedray").addHandler(self.heard)
        for number, path in enumerate(files):
            file = str(path.relative_to(self.whole))
            for how, spoil in damages(path, number, COUNT):
                copied(self.whole, self.place)
                self.heard.text = ""
                spoil(self.place / file)
                with as_any_user():
                    found = self.one(file)
                self.wrong += [f"{self.whole.name}/{file}, {how}: {problem}"[:700] for problem in found]
        logging.getLogger("fedray").removeHandler(self.heard)

    def one(self, file: str) -> list[str]:
        """Return what is wrong with all that reads a folder with a damaged file."""
        self.count += 1
        TRIED[self.whole.name] += 1
        found = [(name, self.problem(file, partial(self.look, name, file))) for name in LOOKS]
        if self.count % BY_COMMAND == 0:
            for name, words in COMMANDS.items():
                found.append((name, self.problem(file, partial(by_command, words(self.place, self.other)))))
        found.append(("resume", self.problem(file, partial(self.resumed, self.place, file))))
        return [f"{name}: {problem}" for name, problem in found if problem is not None]

    def problem(self, file: str, use: Callable[[], str | None]) -> str | None:
        """Return what is wrong with a use of the folder; to refuse it with the file's name is right."""
        try:
            return use()
        except FedrayError as error:
            if names(str(error), file) or f"refused: {error}" in self.expected.values():
                return None
            is_open = self.has_no_result(file) and "unfinished" in str(error)
            return None if is_open else f"names no file: {error}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"

    def look(self, name: str, file: str) -> str | None:
        """Return what is wrong with a view of the folder."""
        self.heard.text = ""
        seen, expected = LOOKS[name](self.place, self.other), self.expected[name]
        if seen == expected or self.has_no_result(file):
            return None
        problem = problem_of(seen) if not isinstance(seen, str) else ""
        if names(problem + self.heard.text, file):
            return None
        return f"another result in silence: {seen} for {expected}"

    def has_no_result(self, file: str) -> bool:
        """Tell whether the file is the result: a run without it has not ended yet, and all say so."""
        return file.endswith("result.json") and not (self.place / file).exists()

    def check(self, least: int) -> None:
        """Assert that nothing was wrong, and that there were enough."""
        assert not self.wrong, f"{len(self.wrong)} of {self.count}:\n" + "\n".join(self.wrong)
        assert self.count >= least
