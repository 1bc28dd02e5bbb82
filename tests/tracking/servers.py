"""A real MLflow server, and a proxy before it that fails as networks and servers do."""

import base64
import socket
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

from fedray.config.uri import sqlite_uri
from fedray.tracking.store import prepare_store
from fedray.tracking.ui import ui_command

State = Literal["well", "gone", "hangs", "401", "500", "503", "drops"]
"""It forwards; closes each connection; never answers; answers so; or drops the answer of a request that it
has forwarded."""


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def answers(address: str) -> bool:
    """Return whether a server says within 5 s that it is well."""
    try:
        urllib.request.urlopen(f"{address}/health", timeout=5).close()
    except OSError:
        return False
    return True


@contextmanager
def started(command: list[str], port: int, folder: Path) -> Iterator[str]:
    """Yield the address of a server that this command starts."""
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        address = f"http://127.0.0.1:{port}"
        try:
            while not answers(address):
                assert process.poll() is None, (folder / "server.log").read_text()[-2000:]
                time.sleep(0.1)
            yield address
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def mlflow_server(folder: Path) -> Iterator[str]:
    """Yield the address of a real server on an SQLite file."""
    uri, port = sqlite_uri(folder / "mlflow.db"), free_port()
    assert prepare_store(uri, "fedray").problem is None
    with started(ui_command(uri, port), port, folder) as address:
        yield address


class Proxy(ThreadingHTTPServer):
    """Forwards requests to a server; `state` and `delay_s` say how it fails.

    Attributes:
        requests: paths of the requests that arrived.
        logins: user:password of these requests.
        only: the state holds for paths that contain this text; others are forwarded.
    """

    daemon_threads = True

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = upstream
        self.state: State = "well"
        self.delay_s = 0.0
        self.only = ""
        self.times = -1
        self.requests: list[str] = []
        self.logins: set[str] = set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def uri(self) -> str:
        """Its own address."""
        return f"http://127.0.0.1:{self.server_port}"

    def mend(self) -> None:
        """Forward all requests at once."""
        self.state, self.delay_s, self.only, self.times = "well", 0.0, "", -1

    def state_for(self, path: str) -> State:
        """Return how to treat a request; the state ends after `times` of them, if that is not negative."""
        if self.only not in path or self.times == 0:
            return "well"
        self.times -= 1
        return self.state

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that were killed."""


class _Handler(BaseHTTPRequestHandler):
    server: Proxy

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(self.path)
        kind, _, login = self.headers.get("Authorization", "").partition(" ")
        if kind == "Basic":
            self.server.logins.add(base64.b64decode(login).decode())
        self.close_connection = True
        state = self.server.state_for(self.path)
        if state == "hangs":
            while self.server.state == "hangs":
                time.sleep(0.05)
            return
        if state == "gone":
            return
        if state in ("401", "500", "503"):
            self.reply(int(state), b"You are not authenticated" if state == "401" else b"no", "text/plain")
            return
        time.sleep(self.server.delay_s)
        headers = {key: value for key, value in self.headers.items() if key.lower() != "host"}
        request = urllib.request.Request(self.server.upstream + self.path, body or None, headers)
        request.get_method = lambda: self.command  # type: ignore[method-assign]
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                got = answer.status, answer.read(), answer.headers.get("Content-Type", "")
        except urllib.error.HTTPError as error:
            got = error.code, error.read(), error.headers.get("Content-Type", "")
        if state != "drops":
            self.reply(*got)

    def reply(self, status: int, body: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer

    def log_message(self, format: str, *args: object) -> None: ...
