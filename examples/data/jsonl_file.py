"""Teaches the samples of a file, whatever their form, and says what the run came to.

Run it beside `apollo up MODEL`, in this folder, with any of its files:

    python jsonl_file.py conversations.jsonl
    python jsonl_file.py questions.jsonl prompt=question completion=answer
"""

from __future__ import annotations

import sys

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError


def main(path: str, columns: dict[str, str] | None) -> None:
    """Trains and exits with 1 when that failed."""
    try:
        with ApolloClient() as client:
            run = client.train(path, columns=columns, epochs=5, lr=3e-5)
            print(f"run {run.run_id}")
            for event in run:
                if event.HasField("step"):
                    print(f"step {event.step.step}: loss {event.step.loss:.4f}")
            result = run.result().raise_for_failure()
    except ApolloError as error:
        # Each wrong line of the file, where it has more than one.
        others = [f"{each.field}: {each.description}" for each in error.violations[1:]]
        sys.exit("\n".join([error.message, *others]))
    print(f"{result.steps} steps: loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: jsonl_file.py FILE [KEY=NAME ...]")
    main(sys.argv[1], dict(word.split("=", 1) for word in sys.argv[2:]) or None)
