"""Teaches the served model one sentence and prints the loss of each step.

Run it beside `apollo up MODEL`:  python examples/train_and_watch.py "The sky is" " green."
"""

from __future__ import annotations

import sys

from apollo_client import ApolloClient, Finished, Step, happened
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1.training_pb2 import RUN_STATE_SUCCEEDED


def main(context: str, continuation: str) -> None:
    """Trains and exits with 1 when that failed."""
    try:
        with ApolloClient() as client:
            for event in client.train([(context, continuation)], epochs=10, lr=3e-5):
                match happened(event):
                    case Step(step=number, loss=loss):
                        print(f"step {number}: loss {loss:.4f}")
                    case Finished(state=state, failure=failure) if state != RUN_STATE_SUCCEEDED:
                        sys.exit(failure.message)
    except ApolloError as error:
        sys.exit(error.message)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('usage: train_and_watch.py "CONTEXT" "CONTINUATION"')
    main(sys.argv[1], sys.argv[2])
