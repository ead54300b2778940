"""Teaches the rows of a pandas DataFrame, and gets the losses back as another.

Needs pandas. Run it beside `apollo up MODEL`:  python examples/data/data_frame.py [LOSSES.svg]
"""

from __future__ import annotations

import sys

import pandas as pd

from apollo_client import ApolloClient
from apollo_grpc.errors import ApolloError

FACTS = pd.DataFrame(
    {
        "question": ["The capital of Aldovia is", "Port Lumen's founder is"],
        "answer": [" Port Lumen.", " Ines Harrow."],
        "source": ["atlas", None],
    }
)


def main(picture: str | None) -> None:
    """Trains and exits with 1 when that failed."""
    columns = {"prompt": "question", "completion": "answer"}
    try:
        with ApolloClient() as client:
            result = client.train(FACTS, columns=columns, epochs=5, lr=3e-5).result()
            steps = result.raise_for_failure().to_pandas()
    except ApolloError as error:
        sys.exit(error.message)
    print(steps[["step", "loss", "grad_norm", "learning_rate"]].to_string(index=False))
    if picture:
        print(f"drawn in {result.plot(picture)}")


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else None)
