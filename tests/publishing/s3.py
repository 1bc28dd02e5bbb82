"""An S3 server in this process: moto's, on a port of this machine."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from fedray.config.places import Place
from fedray.publishing.objects import Objects

LOGIN = {
    "AWS_ACCESS_KEY_ID": "AKIATEST",
    "AWS_SECRET_ACCESS_KEY": "very-secret",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_REGION": "us-east-1",
}


@dataclass
class S3:
    """A server.

    Args:
        port: where it listens.
        bucket: a bucket that it has.
    """

    port: int
    bucket: str = "fedray"
    _server: Any = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def query(self) -> str:
        return f"?endpoint_override=http://127.0.0.1:{self.port}"

    def new(self, name: str = "runs") -> str:
        """Return the address of a place where nothing is."""
        return f"s3://{self.bucket}/{next(self._numbers)}/{name}{self.query}"

    def objects(self, address: str, answer_s: float = 20.0) -> Objects:
        return Objects(Place.parse(address), answer_s=answer_s)

    def stop(self) -> None:
        """Listen no longer; what is stored stays."""
        if self._server is not None:
            self._server.stop()
            self._server = None

    def start(self) -> None:
        from moto.server import ThreadedMotoServer

        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=self.port, verbose=False)
        self._server.start()
        self.port = self._server.get_host_and_port()[1]


@contextmanager
def serving() -> Iterator[S3]:
    """Serve S3 inside."""
    from pyarrow import fs

    server = S3(0)
    server.start()
    try:
        system = fs.S3FileSystem(
            endpoint_override=f"http://127.0.0.1:{server.port}", allow_bucket_creation=True
        )
        system.create_dir(server.bucket)
        yield server
    finally:
        server.stop()
