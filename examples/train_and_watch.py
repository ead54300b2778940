"""Teaches the served model one sentence and prints the loss of each step.

Run it beside `apollo up MODEL`:  python examples/train_and_watch.py "The sky is" " green."
"""

from __future__ import annotations

import sys

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import training_pb2


def main(context: str, continuation: str) -> None:
    """Trains and exits with 1 when that failed."""
    try:
        with ApolloClient() as client:
            for event in client.train([(context, continuation)], epochs=10, lr=3e-5):
                if event.HasField("step"):
                    print(f"step {event.step.step}: loss {event.step.loss:.4f}")
    except ApolloError as error:
        sys.exit(error.message)
    if event.finished.state != training_pb2.RUN_STATE_SUCCEEDED:
        sys.exit(event.finished.failure.message)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: train_and_watch.py "CONTEXT" "CONTINUATION"')
    main(sys.argv[1], sys.argv[2])
