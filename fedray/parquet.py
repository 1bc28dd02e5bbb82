"""Parquet files whose pages have checksums; written as a whole, and read from paths, never from URIs."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedray.durable import replacing
from fedray.errors import RunError

if TYPE_CHECKING:
    import pandas as pd


def write_table(path: Path, columns: Mapping[str, Any]) -> None:
    """Write a table from its columns.

    Raises:
        OSError: if it cannot be written.
    """
    import pyarrow as pa
    from pyarrow import parquet

    with replacing(path) as file:
        parquet.write_table(pa.table(dict(columns)), file, write_page_checksum=True)


def read_table(path: Path) -> "pd.DataFrame | None":
    """Read a table, or a folder of its parts in the order of their names; None if it is missing.

    Raises:
        RunError: if a file is damaged, with its name.
    """
    import pandas as pd

    if not path.is_dir():
        return _read(path) if path.exists() else None
    parts = [_read(part) for part in sorted(path.glob("[!._]*.parquet"))]
    return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame()


def _read(path: Path) -> "pd.DataFrame":
    from pyarrow import parquet

    try:
        with open(path, "rb") as file:
            frame: pd.DataFrame = parquet.read_table(file, page_checksum_verification=True).to_pandas()
    except (OSError, ValueError, MemoryError) as error:  # pyarrow's own errors are among these
        raise RunError(f"{path}: cannot be read: {error}") from None
    return frame
