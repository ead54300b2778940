"""Teaches the served model from a chat log: corrected answers are learned, good ones must stay.

Run it beside `apollo up MODEL`:  python examples/recipes/correct_from_chats.py LOG.jsonl

A line is {"messages": [...], "rating": "good" or "bad", "corrected": "..."}. The last message is
what the model answered; `corrected`, where it is given, is what it should have said.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from verdict import verdict_of

from apollo_client import ApolloClient, RunOptions, to_sample
from apollo_client.facts import RECIPE
from apollo_client.forms import Form
from apollo_client.sample_files import read_placed
from apollo_grpc.errors import ApolloError, InvalidArgument

Chat = dict[str, Any]
FORM = '{"messages": [...], "rating": "good" or "bad", "corrected": "..."}'


def to_chat(value: Any) -> Chat:
    """One chat of a log. Raises InvalidArgument for what is none."""
    if not isinstance(value, Mapping):
        raise InvalidArgument.at("chat", f"is no object of the form {FORM}")
    chat = to_sample({"messages": value.get("messages")}).chat
    if len(chat.messages) < 2 or chat.messages[-1].role != "assistant":
        raise InvalidArgument.at("messages", "do not end with a question and its answer")
    if value.get("rating") not in (None, "good", "bad"):
        raise InvalidArgument.at("rating", 'is neither "good" nor "bad"')
    return dict(value)


CHATS = Form[Chat]("chats", FORM, lambda value: [to_chat(value)])


def corrections(chats: Iterable[Chat]) -> list[Chat]:
    """What should have been said, as samples."""
    return [
        {"messages": [*chat["messages"][:-1], {"role": "assistant", "content": chat["corrected"]}]}
        for chat in chats
        if chat.get("corrected")
    ]


def praised(chats: Iterable[Chat]) -> list[Chat]:
    """What was said well, as samples."""
    return [
        {"messages": chat["messages"]}
        for chat in chats
        if chat.get("rating") == "good" and not chat.get("corrected")
    ]


def probe(sample: Chat, role: str) -> Chat:
    """Asks how likely an answer is: two good answers seldom have the same words."""
    question = sample["messages"][-2]["content"]
    return {**sample, "name": question, "role": role, "check": "log_probability"}


def lesson(chats: list[Chat]) -> tuple[list[Chat], RunOptions]:
    """Samples and options of the run, which is taken back where it does not do what it should."""
    samples, anchors = corrections(chats), praised(chats)
    # Samples of any kind and number: until each is learned.
    options = RECIPE | RunOptions(schedule="constant", epochs=60, min_loss=0.1)
    options["anchors"] = anchors
    options["probes"] = [
        *(probe(sample, "learn") for sample in samples),
        *(probe(anchor, "keep") for anchor in anchors),
    ]
    options["accept_if"] = {"max_failed": 0, "max_lost": 0}
    return samples, options


def main() -> int:
    """0 where the corrections were learned and kept, 1 where not."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("log")
    parser.add_argument("--lr", type=float, default=RECIPE["lr"])
    given = parser.parse_args()
    chats = [placed.value for placed in read_placed(given.log, CHATS)]
    samples, options = lesson(chats)
    options["lr"] = given.lr
    left = len(chats) - len(samples) - len(praised(chats))
    print(f"{len(samples)} corrections, {len(praised(chats))} good answers, {left} left out")
    if not samples:
        return 0
    with ApolloClient() as client:
        verdict = verdict_of(client.train(samples, **options))
    print("\n".join(verdict.lines()))
    return 0 if verdict.learned else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ApolloError as error:
        sys.exit(error.message)
