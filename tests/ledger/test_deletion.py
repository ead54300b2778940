"""A run that is deleted: nothing that somebody wrote is in the files any more, all else goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.ledger.ledger import Choice
from tests.books import Books, finish
from tests.ledger.test_feed import settle

SECRET = "a canary that sings in no file"
# More than a page, so that it lies on pages of its own; and one that lies among others.
LONG, SHORT = f"{SECRET} " * 5000, SECRET


def secret_spec(text: str) -> pb.RunSpec:
    sample = pb.Sample(text=pb.TextSample(context=text, continuation=text))
    return pb.RunSpec(
        samples=[sample],
        evaluation_samples=[sample],
        anchors=pb.Anchors(samples=[sample]),
        probes=[pb.Probe(name=text, sample=sample)],
        name=text[:200],
        labels={text[:100]: text[:100]},
    )


def live(books: Books, run_id: str, text: str) -> None:
    """A whole run that says the text wherever one can be."""
    log = books.accept(run_id, f"{text[:100]} {run_id}", secret_spec(text))
    log.append(started=pb.RunEvent.Started(steps_total=300, optimizer_step=7, engine_epoch="e"))
    for number in range(1, 301):
        log.append(step=pb.RunEvent.Step(step=number))
        if number % 100 == 0:
            log.append(warning=pb.Notice(reason="A", message=text))
            settle(log)
    log.append(probed=pb.RunEvent.Probed(results=[pb.ProbeResult(answer=text)]))
    finish(log, 300)
    settle(log)


def said_in(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*") if path.is_file() and is_in(path)]


def is_in(path: Path) -> bool:
    return SECRET.encode() in path.read_bytes()


@pytest.mark.parametrize("text", [LONG, SHORT], ids=["long", "short"])
def test_nothing_of_it_is_left_in_any_file_while_the_server_runs(
    open_books: Any, state_dir: Path, text: str
) -> None:
    books = open_books()
    for number in range(3):
        live(books, f"kept before {number}", "nothing secret")
        live(books, f"secret {number}", text)
        live(books, f"kept after {number}", "nothing secret")
    assert said_in(state_dir)
    for number in range(3):
        books.delete(f"secret {number}")
    assert said_in(state_dir) == []
    for number in range(3):
        assert books.ledger.run(f"secret {number}") is None
        assert books.ledger.events(f"secret {number}", 0, 10) == []
        assert books.ledger.spec(f"secret {number}") is None
        for when in ("before", "after"):
            events = books.ledger.events(f"kept {when} {number}", 0, 1000)
            assert [event.sequence for event in events] == list(range(1, 308))
    assert len(books.ledger.page(Choice(), 50)) == 6
    books.close()
    assert said_in(state_dir) == []


def test_its_request_id_is_free_again_and_its_steps_are_still_known(open_books: Any) -> None:
    books = open_books()
    live(books, "a", "mine")
    books.delete("a")
    assert books.ledger.run_of_request("mine a") is None
    # By these the optimizer is found again after a kill.
    row = books.ledger.latest_on("e")
    assert (row.optimizer_step, row.steps_done) == (7, 300)
    live(books, "b", "mine")
    books.close()
    books = open_books()
    assert books.waiting == []
    assert [row.run_id for row in books.ledger.page(Choice(), 50)] == ["b"]
