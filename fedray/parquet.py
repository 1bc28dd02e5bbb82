"""Parquet files with checksums; written as a whole, and read from paths, never from URIs.

A file has the checksums of its pages, which any reader can check, and in its schema's metadata the SHA-256 of
names, types and values. A file without the latter was written by an earlier version, and is read without it.
"""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fedray.durable import replacing
from fedray.errors import RunError

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SHA256 = b"fedray.sha256"


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a table from its columns.

    Raises:
        OSError: if it cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    table = pa.table(dict(columns))
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), SHA256: _digest(table)})
    with replacing(path) as file:
        parquet.write_table(table, file, write_page_checksum=True)


def read_table(path: Path) -> "pd.DataFrame | None":
    """Read a table, or a folder of its parts in the order of their names; None if it is missing.

    Raises:
        RunError: if a file is damaged, with its name.
    """
    import pandas as pd

    if not path.is_dir():
        return _read(path) if os.path.lexists(path) else None
    parts = [_read(part) for part in sorted(path.glob("[!._]*.parquet"))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _read(path: Path) -> "pd.DataFrame":
    from pyarrow import parquet

    try:
        with open(path, "rb") as file:
            table = parquet.read_table(file, page_checksum_verification=True)
            written = (table.schema.metadata or {}).get(SHA256)
            if written is not None and written != _digest(table):
                raise ValueError("it is damaged: its SHA-256 does not match")
            frame: pd.DataFrame = table.to_pandas()
    except Exception as error:  # damaged bytes make pyarrow and pandas raise errors of many kinds
        raise RunError(f"{path}: cannot be read: {error}") from None
    return frame


def _digest(table: "pa.Table") -> bytes:
    """Return the SHA-256 (hex) of a table's names, types and values."""
    digest = sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        digest.update(f"{name} {column.type} {len(column)} {column.null_count}\n".encode())
        values = column.to_numpy()
        is_text = values.dtype == object
        digest.update(repr(values.tolist()).encode() if is_text else np.ascontiguousarray(values).tobytes())
    return digest.hexdigest().encode()
