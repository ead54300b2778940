"""Follows every run of a training server, as a service that plots or alarms would.

Run it beside `apollo up MODEL`; it goes on when the server is restarted.
"""

from __future__ import annotations

import asyncio

from apollo_client import AsyncApolloClient
from apollo_grpc.errors import Unavailable

RETRY_SECONDS = 1.0


async def follow() -> None:
    """Prints the loss of each step of each run, for ever."""
    async with AsyncApolloClient() as client:
        while True:
            try:
                async for update in client.watch():
                    if update.dropped:
                        print(f"{update.dropped} updates were lost: this reader is too slow")
                    if update.event.HasField("step"):
                        step = update.event.step
                        print(f"{update.event.run_id[:8]}  {step.step:5}  {step.loss:.4f}")
            except Unavailable as error:
                print(error.message)
                await asyncio.sleep(RETRY_SECONDS)


if __name__ == "__main__":
    asyncio.run(follow())
