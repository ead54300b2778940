"""A CSV file holds each step of a run once, wherever its sink was cut off."""

from __future__ import annotations

import csv
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from apollo_client.sinks import open_sink
from apollo_grpc.errors import FailedPrecondition
from apollo_grpc.v1 import training_pb2 as pb
from tests.client.sinks.run_events import RUN, events

EVENTS = events(6)


def keep(file: Path, of_run: list[pb.RunEvent] = EVENTS) -> int:
    """Writes what the file lacks of a run; returns behind which event that began."""
    with closing(open_sink(f"csv:{file}", of_run[0].run_id)) as sink:
        after = sink.after
        for event in of_run[after:]:
            sink.write(event)
    return after


def rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The file of a sink that nobody ended."""
    file = tmp_path_factory.mktemp("whole") / "run.csv"
    keep(file)
    return file.read_bytes()


def test_each_step_is_a_row_with_its_figures(tmp_path: Path) -> None:
    keep(file := tmp_path / "run.csv")
    found = rows(file)
    assert [row["step"] for row in found] == ["1", "2", "3", "4", "5", "6"]
    third = found[2]
    assert (third["run_id"], third["sequence"], third["loss"]) == (RUN, "6", str(1 / 3))
    assert third["time"] == "2023-11-14T22:13:26Z"
    assert (third["forward_seconds"], third["anchor_loss"]) == ("0.003", "")


def test_the_columns_are_these(whole: bytes) -> None:
    assert whole.decode().splitlines()[0] == (
        "run_id,sequence,time,step,loss,loss_sum,tokens,grad_norm,update_norm,learning_rate,"
        "changed_fraction,optimizer_step,epoch,micro_batches,forward_seconds,backward_seconds,"
        "optimizer_seconds,pause_seconds,wait_seconds,anchor_loss,policy_mean_ratio,policy_kl,"
        "policy_clipped_fraction"
    )


def test_a_file_that_was_cut_off_anywhere_is_gone_on_with(tmp_path: Path, whole: bytes) -> None:
    file = tmp_path / "run.csv"

    @given(st.integers(0, len(whole)))
    @example(0)
    @example(5)
    @example(whole.index(b"\n") + 1)
    def goes_on(length: int) -> None:
        file.write_bytes(whole[:length])
        keep(file)
        assert file.read_bytes() == whole

    goes_on()


def test_one_file_takes_several_runs_and_goes_on_with_each(tmp_path: Path) -> None:
    file, other = tmp_path / "run.csv", events(2, "ffff")
    assert keep(file, EVENTS[:5]) == 0
    assert keep(file, other) == 0
    assert keep(file) == 5
    assert keep(file, other) == 5
    assert [(row["run_id"], row["step"]) for row in rows(file)] == [
        *((RUN, str(step)) for step in (1, 2)),
        *(("ffff", str(step)) for step in (1, 2)),
        *((RUN, str(step)) for step in (3, 4, 5, 6)),
    ]


@pytest.mark.parametrize(
    "content",
    [b"two\nlines\n", b"one line", b"\xff\xfe\n", b"run_id,sequence\n", b"{HEADER}x,y\n"],
    ids=["text", "torn", "bytes", "columns", "row"],
)
def test_a_file_of_somebody_else_is_left_as_it_is(
    tmp_path: Path, whole: bytes, content: bytes
) -> None:
    header = whole.splitlines(keepends=True)[0]
    content = content.replace(b"{HEADER}", header)
    (file := tmp_path / "run.csv").write_bytes(content)
    with pytest.raises(FailedPrecondition, match="left as it is") as refused:
        open_sink(f"csv:{file}", RUN)
    assert refused.value.reason == "SINK_NOT_RESUMABLE"
    assert file.read_bytes() == content


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    for place in (tmp_path, Path("/dev/zero")):
        with pytest.raises(FailedPrecondition, match="no file"):
            open_sink(f"csv:{place}", RUN)


def test_two_sinks_do_not_write_one_file(tmp_path: Path) -> None:
    target = f"csv:{tmp_path / 'run.csv'}"
    with closing(open_sink(target, RUN)):
        with pytest.raises(FailedPrecondition) as refused:
            open_sink(target, RUN)
        assert refused.value.reason == "SINK_IN_USE"
    open_sink(target, RUN).close()


def test_a_full_disk_is_told_and_the_rest_is_written_once_there_is_room(
    tmp_path: Path, whole: bytes
) -> None:
    file = tmp_path / "run.csv"
    sink = open_sink(f"csv:{file}", RUN)
    for event in EVENTS[:4]:
        sink.write(event)

    class Full:
        def write(self, row: bytes) -> int:
            return file.open("ab").write(row[:7])

    real, sink._file = sink._file, Full()  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="No space left"):
        sink.write(EVENTS[4])
    real.close()
    keep(file)
    assert file.read_bytes() == whole
