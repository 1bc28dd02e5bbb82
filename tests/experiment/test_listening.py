"""Of a local run nothing listens beyond loopback: every socket of every process that it starts."""

from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from tests.experiment.test_terminal import Start, have_rounds, start, write, write_sweep
from tests.terminal import Terminal

__all__ = ["start"]


def is_loopback(ip: str) -> bool:
    """Whether an address is this machine's loopback; sockets of IPv6 show one of IPv4 as ::ffff:127.0.0.1."""
    address = ip_address(ip)
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def listening(terminal: Terminal) -> dict[str, set[str]]:
    """Return the addresses on which a command and the processes below it accept connections, by process."""
    top = psutil.Process(terminal.process.pid)
    found: dict[str, set[str]] = {}
    for process in [top, *top.children(recursive=True)]:
        for socket in process.net_connections("inet"):
            if socket.status == psutil.CONN_LISTEN:
                found.setdefault(process.name(), set()).add(socket.laddr.ip)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "sweep"])
def test_nothing_listens_beyond_loopback(kind: str, start: Start, tmp_path: Path) -> None:
    if kind == "run":
        write(tmp_path, {"clients.actors": 2})
    else:
        write_sweep(tmp_path, 1)
    terminal = start(kind, "x.yaml", "--out", "r")
    names = ["r"] if kind == "run" else ["r/trials/00-seed=0"]
    terminal.until(have_rounds(tmp_path, *names))
    found = listening(terminal)
    assert {"raylet", "gcs_server"} <= set(found)  # it looks at all of them
    assert {name: ips for name, ips in found.items() if not all(map(is_loopback, ips))} == {}
    terminal.press_ctrl_c()
    assert terminal.ended(60) == 130
