"""Memory and CPU time of a process and everything below it, from /proc."""

import os
from pathlib import Path


def tree(pid: int) -> list[int]:
    """Return a process and all its descendants; empty if it has ended."""
    try:
        # a child belongs to the thread that started it
        lists = [path.read_text(encoding="ascii") for path in Path(f"/proc/{pid}/task").glob("*/children")]
    except (FileNotFoundError, ProcessLookupError):
        return []
    if not lists:
        return []
    return [pid, *(below for children in lists for child in children.split() for below in tree(int(child)))]


def tree_memory_bytes(pid: int) -> int:
    """Return the proportional set size of a process and its descendants, in bytes."""
    return sum(map(_memory_bytes, tree(pid)))


def tree_cpu_s(pid: int) -> float:
    """Return the CPU seconds, user and system, of a process and its living descendants."""
    return sum(map(_cpu_s, tree(pid)))


def _memory_bytes(pid: int) -> int:
    try:
        rollup = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii")
    except (FileNotFoundError, ProcessLookupError):
        return 0  # it ended meanwhile
    return next((int(line.split()[1]) * 1024 for line in rollup.splitlines() if line.startswith("Pss:")), 0)


def _cpu_s(pid: int) -> float:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return 0.0
    user, system = stat.rpartition(")")[2].split()[11:13]  # the name before may hold blanks
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def memory_by_name(pid: int) -> dict[str, list[int]]:
    """Return name → proportional set sizes in bytes, of a process and its descendants; the largest first."""
    sizes: dict[str, list[int]] = {}
    for each in tree(pid):
        if size := _memory_bytes(each):
            sizes.setdefault("driver" if each == pid else _name(each), []).append(size)
    return dict(sorted(sizes.items(), key=lambda item: -sum(item[1])))


def _name(pid: int) -> str:
    """Return a short name: Ray's own for its workers, the file for a script or a program."""
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except (FileNotFoundError, ProcessLookupError):
        return "ended"
    words = line.decode(errors="replace").split() or ["ended"]
    if words[0].startswith("ray::"):
        return words[0].removeprefix("ray::")
    is_python = Path(words[0]).name.startswith("python")
    script = next((word for word in words[1:] if is_python and word.endswith(".py")), words[0])
    return Path(script).name
