"""What files of samples are packed in: gzip, and tables of Parquet."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from gzip import GzipFile
from importlib import import_module
from io import BytesIO
from typing import Any

from apollo_grpc.errors import InvalidArgument

GZIP, PARQUET = b"\x1f\x8b", b"PAR1"


def unpacked(data: bytes, name: str, most: int) -> bytes:
    """What gzip has packed, up to `most` bytes. Raises InvalidArgument for what is cut off."""
    try:
        return GzipFile(fileobj=BytesIO(data)).read(most)
    except (EOFError, OSError, zlib.error) as error:
        says = f"is a gzip archive that cannot be unpacked: {error}"
        raise InvalidArgument.at(name, says) from error


def table_rows(data: bytes, name: str) -> Iterator[dict[str, Any]]:
    """The rows of a table. Raises InvalidArgument for what is none, or where pyarrow is missing."""
    try:
        parquet, arrow = import_module("pyarrow.parquet"), import_module("pyarrow")
    except ImportError as error:
        says = (
            "is a Parquet table: 'pip install pyarrow' lets it be read, or write it as JSON lines"
        )
        raise InvalidArgument.at(name, says) from error
    try:
        for batch in parquet.ParquetFile(arrow.BufferReader(data)).iter_batches():
            yield from batch.to_pylist()
    except (arrow.ArrowException, OSError) as error:
        says = f"is a Parquet table that cannot be read: {str(error).splitlines()[0]}"
        raise InvalidArgument.at(name, says) from error
