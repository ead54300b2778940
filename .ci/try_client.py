"""The base install in an empty environment: how much it is, how fast it is there, and one run."""

from __future__ import annotations

import os
import runpy
import statistics
import subprocess
import sys
import time
from importlib import metadata

from apollo_client.testing import FakeServer

HEAVY = {"torch", "numpy", "transformers", "vllm"}
MOST_PACKAGES = 20


def seconds(code: str) -> float:
    """What a Python takes for it, the median of ten; its modules are compiled before."""
    taken = []
    for _ in range(11):
        began = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


names = {each.name for each in metadata.distributions()} - {"pip", "setuptools"}
if len(names) >= MOST_PACKAGES or names & HEAVY:
    sys.exit(f"wheel: the base install brings {len(names)} packages: {sorted(names)}")
codes = ("pass", "import grpc", "from apollo_client import ApolloClient")
empty, grpc, client = map(seconds, codes)
print(
    f"Python {sys.version.split()[0]}: {len(names)} packages; an empty program {empty:.3f} s, "
    f"with grpc {grpc:.3f} s, with the client {client:.3f} s",
    flush=True,
)
with FakeServer(losses=[3.0, 0.5, 0.01]) as server:
    os.environ["APOLLO_ADDRESS"] = server.address
    sys.argv = ["train_and_watch.py", "The sky is", " green."]
    runpy.run_path("examples/train_and_watch.py", run_name="__main__")
