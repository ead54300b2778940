"""What `train` takes as its samples: lists, files, data frames, datasets of Hugging Face."""

from __future__ import annotations

from collections.abc import AsyncIterable, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, Protocol, TypeAlias, TypeVar

from apollo_client.forms import Form
from apollo_client.probes import ProbeLike
from apollo_client.sample_files import read_placed
from apollo_client.samples import SampleLike
from apollo_grpc.errors import InvalidArgument


class Frame(Protocol):
    """A DataFrame of pandas: a row a sample, a column a key; missing values are missing keys."""

    def itertuples(self, index: bool = ..., name: Any = ...) -> Iterable[Any]:
        """The rows."""


FilePath: TypeAlias = str | PathLike[str]
Samples: TypeAlias = Iterable[SampleLike] | FilePath | Frame
AsyncSamples: TypeAlias = Samples | AsyncIterable[SampleLike]
Probes: TypeAlias = Iterable[ProbeLike] | FilePath | Frame
# Their name of each key of a sample.
Columns: TypeAlias = Mapping[str, str] | None
T = TypeVar("T")
# Longer than any that Linux opens.
MAX_PATH = 4096


def items_of(data: Any, form: Form[T]) -> Any:
    """What a form's `all_of` takes: of a file what it holds, of a frame its rows.

    Raises InvalidArgument with each wrong line of a file.
    """
    if isinstance(data, str) and len(data) > MAX_PATH:
        raise InvalidArgument.at(form.name, "are a text, which is too long to name a file")
    if isinstance(data, str | PathLike):
        return read_placed(data, form)
    return _rows(data) if hasattr(data, "itertuples") else data


def _rows(frame: Any) -> Iterator[dict[str, Any]]:
    known = frame.astype(object).where(frame.notna(), None)
    for row in known.itertuples(index=False, name=None):
        yield {str(key): _plain(cell) for key, cell in zip(frame.columns, row, strict=True)}


def _plain(cell: Any) -> Any:
    """A list where a frame has an array, as those read from Parquet do."""
    return cell.tolist() if hasattr(cell, "tolist") else cell
