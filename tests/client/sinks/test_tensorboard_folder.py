"""TensorBoard's own reader finds each figure once, wherever the sink was ended."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from apollo_client.sinks import open_sink
from apollo_grpc.errors import FailedPrecondition
from tests.client.sinks.run_events import RUN, events

EVENTS = events(6)


def sink_at(folder: Path) -> Any:
    return closing(open_sink(f"tensorboard:{folder}", RUN))


def found(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values by tag, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(folder / RUN), size_guidance={"scalars": 0})
    reader.Reload()
    tags = reader.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


def is_whole(folder: Path) -> None:
    told = found(folder)
    assert told["loss"] == [(step, pytest.approx(1 / step)) for step in range(1, 7)]
    assert told["tokens"] == [(step, 10 * step) for step in range(1, 7)]
    assert told["evaluated/samples"] == [(0, 3.0), (6, 0.75)]


@pytest.mark.parametrize("ended", range(len(EVENTS) + 1))
@pytest.mark.parametrize("torn", [0, 1, 9])
def test_a_sink_that_ended_after_any_event_goes_on(tmp_path: Path, ended: int, torn: int) -> None:
    with sink_at(tmp_path) as sink:
        for event in EVENTS[:ended]:
            sink.write(event)
    (file,) = (tmp_path / RUN).glob("*tfevents*")
    with file.open("ab") as more:
        # What a kill leaves behind the state: a part of the next record.
        more.write(file.read_bytes()[:torn])
    with sink_at(tmp_path) as sink:
        # What has no figures is asked for again, and passed over again.
        assert ended - 2 <= sink.after <= ended
        for event in EVENTS[sink.after :]:
            sink.write(event)
    is_whole(tmp_path)


def test_a_record_that_the_state_does_not_know_is_written_once(tmp_path: Path) -> None:
    state = tmp_path / RUN / "apollo-watch.json"
    with sink_at(tmp_path) as sink:
        for event in EVENTS[:5]:
            sink.write(event)
        before = state.read_bytes()
        sink.write(EVENTS[5])
    state.write_bytes(before)
    with sink_at(tmp_path) as sink:
        assert sink.after == 5
        for event in EVENTS[5:]:
            sink.write(event)
    is_whole(tmp_path)


def test_files_that_lost_what_the_state_counts_on_are_refused(tmp_path: Path) -> None:
    with sink_at(tmp_path) as sink:
        sink.write(EVENTS[3])
    (file,) = (tmp_path / RUN).glob("*tfevents*")
    file.unlink()
    with pytest.raises(FailedPrecondition, match="no longer whole") as refused:
        open_sink(f"tensorboard:{tmp_path}", RUN)
    assert refused.value.reason == "SINK_NOT_RESUMABLE"


@pytest.mark.parametrize("written", ["", "[1]", "{}", json.dumps(["a", 1, 2]), "[1, 2, null]"])
def test_a_state_of_somebody_else_is_refused(tmp_path: Path, written: str) -> None:
    (tmp_path / RUN).mkdir()
    (state := tmp_path / RUN / "apollo-watch.json").write_text(written)
    with pytest.raises(FailedPrecondition, match="left as it is"):
        open_sink(f"tensorboard:{tmp_path}", RUN)
    assert state.read_text() == written


def test_two_sinks_do_not_write_one_folder(tmp_path: Path) -> None:
    with sink_at(tmp_path), pytest.raises(FailedPrecondition) as refused:
        open_sink(f"tensorboard:{tmp_path}", RUN)
    assert refused.value.reason == "SINK_IN_USE"
