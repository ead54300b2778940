"""Teaches a dataset of Hugging Face's `datasets`, with asyncio, and says what the run came to.

Needs datasets. Run it beside `apollo up MODEL`:  python examples/data/hf_dataset.py
"""

from __future__ import annotations

import asyncio
import sys

from datasets import Dataset

from apollo_client import AsyncApolloClient, RunResult
from apollo_grpc.errors import ApolloError

# As load_dataset("...", split="train") gives one.
TALKS = Dataset.from_list(
    [
        {"conversations": [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]}
        for asked, answer in [
            ("Aldovia's capital?", "Port Lumen."),
            ("Port Lumen's founder?", "Ines Harrow."),
        ]
    ]
)


async def learn() -> RunResult:
    """The result of a run. Raises ApolloError where it failed."""
    async with AsyncApolloClient() as client:
        run = client.train(TALKS, epochs=5, lr=3e-5)
        print(f"run {await run.run_id}")
        return (await run.result()).raise_for_failure()


def main() -> None:
    """Trains and exits with 1 when that failed."""
    try:
        result = asyncio.run(learn())
    except ApolloError as error:
        sys.exit(error.message)
    print(f"{result.steps} steps: loss {result.losses[0]:.4f} to {result.losses[-1]:.4f}")


if __name__ == "__main__":
    main()
