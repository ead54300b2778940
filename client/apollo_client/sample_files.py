"""Files of samples or probes: JSON lines, one JSON value that holds them all, or Parquet."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import BytesIO
from os import PathLike
from pathlib import Path
from typing import BinaryIO, Generic, TypeVar

from apollo_client.forms import PROBES, SAMPLES, Form
from apollo_client.json_values import ObjectReader, StrictDecoder, Unreadable, Value, after_space
from apollo_client.packed_files import GZIP, PARQUET, table_rows, unpacked
from apollo_client.placing import Placed, Violations
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.transport import MAX_MESSAGE_BYTES
from apollo_grpc.v1 import training_pb2 as pb

# No file above it holds less than a request: JSON spends at most six bytes on one of text.
MAX_FILE_BYTES = 6 * MAX_MESSAGE_BYTES
T = TypeVar("T")
_HEAD_BYTES = 1024
_BOM = b"\xef\xbb\xbf"
# First bytes of what people hand over instead of text, the longer ones first.
_UNPACK = "unpack it, and give its text to '-', standard input"
_CONVERT = "save it as UTF-8, or give 'iconv -t UTF-8 -f {}' of it to '-', standard input"
_KNOWN = {
    b"\xff\xfe\0\0": ("UTF-32 text", _CONVERT.format("UTF-32")),
    b"\0\0\xfe\xff": ("UTF-32 text", _CONVERT.format("UTF-32")),
    b"\xff\xfe": ("UTF-16 text", _CONVERT.format("UTF-16")),
    b"\xfe\xff": ("UTF-16 text", _CONVERT.format("UTF-16")),
    GZIP: ("a gzip archive within another", _UNPACK),
    b"BZh": ("a bzip2 archive", _UNPACK),
    b"\xfd7zXZ\0": ("an xz archive", _UNPACK),
    b"\x28\xb5\x2f\xfd": ("a zstd archive", _UNPACK),
    b"PK\x03\x04": ("a zip archive", _UNPACK),
    PARQUET: ("a Parquet table", "write it as JSON lines, as pandas' to_json(lines=True) does"),
    b"ARROW1": ("an Arrow table", "write it as JSON lines, as pandas' to_json(lines=True) does"),
}


def read_samples(
    path: str | PathLike[str], columns: Mapping[str, str] | None = None
) -> list[pb.Sample]:
    """The samples of a file, in its order.

    A line, up to LF or CR LF, is one JSON object as `to_sample` takes it; empty lines are passed
    over. One JSON array of such objects, or objects over several lines, are taken as well. The
    text is UTF-8, with or without a byte order mark, and may be packed by gzip. A table of Parquet
    is taken where pyarrow is installed: a row a sample. Names of files mean nothing.

    Args:
        columns: names of keys in the file, as `{"prompt": "question", "completion": "answer"}`; the
            file's other keys are left out then.

    Raises InvalidArgument with `FILE:LINE` for each wrong line, the first 20 of them, and for a
    file that cannot be read or holds no sample.
    """
    return [placed.value for placed in read_placed(path, SAMPLES.of_columns(columns))]


def read_probes(path: str | PathLike[str]) -> list[pb.Probe]:
    """The probes of a file, by the same rules; an object is as `to_probe` takes it."""
    return [placed.value for placed in read_placed(path, PROBES)]


def read_placed(path: str | PathLike[str], form: Form[T]) -> list[Placed[T]]:
    """The same, each with its `FILE:LINE`, which `train` then names in a refusal."""
    # Without control characters, which would be written to the terminal.
    path, name = Path(path), repr(str(path))[1:-1]
    with _told(name, form):
        # A pipe with a name may wait for its writer for ever; one that a shell opened does not.
        if path.is_fifo() and path.resolve().is_fifo():
            raise InvalidArgument.at(name, "is a named pipe: give it to '-' with <")
        with path.open("rb") as file:
            return read_stream(file, name, form)


def read_standard_input(form: Form[T]) -> list[Placed[T]]:
    """What standard input holds, by the same rules; errors call it "stdin"."""
    if sys.stdin is None:
        raise InvalidArgument.at("stdin", "is closed: name a file")
    with _told("stdin", form):
        return read_stream(sys.stdin.buffer, "stdin", form)


@contextmanager
def _told(name: str, form: Form[T]) -> Iterator[None]:
    try:
        yield
    except IsADirectoryError as error:
        says = f"is a directory: name a file of {form.name} in it"
        raise InvalidArgument.at(name, says) from error
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise InvalidArgument.at(name, f"cannot be read: {reason}") from error


def read_stream(stream: BinaryIO, name: str, form: Form[T]) -> list[Placed[T]]:
    """What a stream of bytes holds, by the same rules; errors call it `name`."""
    # What is no text may have no end, as /dev/zero.
    head = stream.read(_HEAD_BYTES)
    is_table, is_packed = head.startswith(PARQUET), head.startswith(GZIP)
    if not (is_table or is_packed):
        _require_text(head, name)
    data = head + stream.read(MAX_FILE_BYTES + 1 - _HEAD_BYTES)
    if is_packed:
        data = unpacked(data, name, MAX_FILE_BYTES + 1)
        _require_text(data[:_HEAD_BYTES], name)
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument.at(
            name,
            f"is longer than {MAX_FILE_BYTES >> 20} MiB, which is read at once: cut it, as "
            "'split -C 60m' does; 'apollo datasets add' makes one dataset of the parts",
        )
    found = (_from_table if is_table else _from_lines)(data, name, form)
    if not found:
        says = f"holds no {form.name}; a line is one object, {form.words}"
        raise InvalidArgument.at(name, says)
    return found


def _require_text(head: bytes, name: str) -> None:
    for start, (kind, advice) in _KNOWN.items():
        if head.startswith(start):
            raise InvalidArgument.at(name, f"is {kind}: {advice}")
    if b"\0" in head:
        raise InvalidArgument.at(name, "is no text, or UTF-16: save it as UTF-8 text")


def _from_lines(data: bytes, name: str, form: Form[T]) -> list[Placed[T]]:
    found, objects, others = _Found(name, form), 0, 0
    # Where a text ends with its line at the latest, a tab in it can only mean itself.
    decoder = StrictDecoder(strict=False)
    for number, line in enumerate(BytesIO(data), start=1):
        if not (line := line.removeprefix(_BOM)).strip():
            continue
        try:
            value = _only(line, decoder)
        except Unreadable as error:
            others += 1
            found.wrong.add(f"{name}:{number}", error.message)
        else:
            is_object = isinstance(value, dict)
            objects, others = objects + is_object, others + (not is_object)
            found.take(Value(value, number, decoder.odd))
        if found.wrong.is_full():
            break
    return _from_document(data, found, objects) if others else found.all()


def _from_table(data: bytes, name: str, form: Form[T]) -> list[Placed[T]]:
    found = _Found(name, form, "row ")
    for number, row in enumerate(table_rows(data, name), start=1):
        found.take(Value(row, number, ""))
        if found.wrong.is_full():
            break
    return found.all()


def _only(line: bytes, decoder: StrictDecoder) -> object:
    """The only value of a line."""
    text = _text(line)
    value, end = decoder.at(text, after_space(text, 0))
    if end < len(text):
        raise Unreadable(f"has more after its value, at column {end + 1}")
    return value


def _from_document(data: bytes, lines: _Found[T], objects: int) -> list[Placed[T]]:
    """What the whole text holds, where lines hold none; else the refusal of these lines."""
    found = _Found(lines.name, lines.form)
    try:
        for value in ObjectReader(_text(data.removeprefix(_BOM))):
            found.take(value)
    except Unreadable as error:
        if not objects or data.removeprefix(_BOM).lstrip().startswith(b"["):
            place = f"{lines.name}:{error.line}"
            raise InvalidArgument.at(
                place, f"{error.message}; a line is one object, {lines.form.words}"
            ) from error
        found = lines
    return found.all()


class _Found(Generic[T]):
    """What a file holds, and what is wrong with it."""

    def __init__(self, name: str, form: Form[T], unit: str = ""):
        self.name, self.form, self.wrong = name, form, Violations()
        self._unit = unit
        self._placed = list[Placed[T]]()

    def take(self, value: Value) -> None:
        """What one value holds."""
        place = f"{self.name}:{self._unit}{value.line}"
        if value.odd:
            self.wrong.add(place, value.odd)
            return
        try:
            self._placed += [Placed(each, place) for each in self.form.read(value.value)]
        except InvalidArgument as error:
            self.wrong.add(place, error.message)

    def all(self) -> list[Placed[T]]:
        """All of it; raises InvalidArgument where something is wrong."""
        self.wrong.raise_any("lines")
        return self._placed


def _text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start)
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise Unreadable(
            f"is no UTF-8: byte 0x{data[error.start]:02X} at column {column}; save it as UTF-8",
            line + 1,
        ) from error
