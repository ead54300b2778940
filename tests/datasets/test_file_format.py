"""A file of samples gives them back, or says that it does not."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from apollo_grpc.errors import DataLoss
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.datasets.file_format import (
    ID_DIGITS,
    StoredSamples,
    ending,
    read_about,
    records,
)

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=5)
SAMPLES = st.one_of(
    st.builds(
        lambda context, ids, weight: pb.Sample(
            tokens=pb.TokenSample(context_ids=context, continuation_ids=ids), weight=weight
        ),
        IDS,
        IDS,
        st.none() | st.floats(0, 10),
    ),
    st.builds(
        lambda a, b: pb.Sample(text=pb.TextSample(context=a, continuation=b)),
        st.text(max_size=8),
        st.text(max_size=8),
    ),
    st.builds(pb.Sample),
)
LISTS = st.lists(SAMPLES, min_size=1, max_size=4)


def whole(samples: list[pb.Sample], name: str = "") -> tuple[str, bytes]:
    """The name and the content of a file."""
    data = records(samples)
    about = dataset_pb2.Dataset(name=name, samples=len(samples), size_bytes=len(data))
    about.digest = hashlib.sha256(data).hexdigest()
    return about.digest[:ID_DIGITS], data + ending(about)


def read(name: str, content: bytes) -> list[pb.Sample]:
    """What a file of this content gives back. Raises DataLoss."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        return list(StoredSamples(path, read_about(path)))


@settings(deadline=None, max_examples=50)
@given(samples=LISTS, name=st.text(max_size=8))
def test_what_was_written_comes_back(samples: list[pb.Sample], name: str) -> None:
    file, content = whole(samples, name)
    assert read(file, content) == samples


@settings(deadline=None, max_examples=50)
@given(samples=LISTS, parts=st.integers(1, 4))
def test_the_bytes_do_not_depend_on_the_messages(samples: list[pb.Sample], parts: int) -> None:
    cut = b"".join(records(samples[at : at + parts]) for at in range(0, len(samples), parts))
    assert cut == records(samples)


def is_found(name: str, content: bytes) -> bool:
    try:
        read(name, content)
    except DataLoss as error:
        return error.reason == "DATASET_DAMAGED"
    return False


@settings(deadline=None, max_examples=30)
@given(samples=LISTS, data=st.data())
def test_a_cut_and_a_changed_byte_are_found(samples: list[pb.Sample], data: st.DataObject) -> None:
    name, content = whole(samples, "a")
    size = data.draw(st.integers(0, len(content) - 1))
    assert is_found(name, content[:size])
    at, bit = data.draw(st.integers(0, len(content) - 1)), data.draw(st.integers(0, 7))
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    assert is_found(name, bytes(changed))


def test_every_cut_and_every_changed_byte_of_one_file_is_found() -> None:
    name, content = whole([pb.Sample(text=pb.TextSample(context="a", continuation="b"))], "n")
    assert all(is_found(name, content[:size]) for size in range(len(content)))
    for at in range(len(content)):
        changed = bytearray(content)
        changed[at] ^= 1 << at % 8
        assert is_found(name, bytes(changed)), at
    assert is_found(name, content + b"\0")
    assert is_found("0" * ID_DIGITS, content)
