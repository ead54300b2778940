"""Clients of the training server: `ApolloClient`, `AsyncApolloClient`, and the `apollo` command."""

from apollo_client.aio import AsyncApolloClient, AsyncRunsStream, AsyncRunStream, AsyncStream
from apollo_client.client import ApolloClient, RunsStream, RunStream, Stream
from apollo_client.data import Samples
from apollo_client.events import (
    Evaluated,
    Finished,
    Happened,
    Notice,
    Probed,
    Queued,
    Started,
    StateSaved,
    Step,
    happened,
)
from apollo_client.probes import ProbeLike, to_probe
from apollo_client.requests import RunOptions, run_spec
from apollo_client.run_result import RunResult
from apollo_client.sample_files import read_probes, read_samples
from apollo_client.samples import SampleLike, to_sample, to_samples

__all__ = [
    "ApolloClient",
    "AsyncApolloClient",
    "AsyncRunStream",
    "AsyncRunsStream",
    "AsyncStream",
    "Evaluated",
    "Finished",
    "Happened",
    "Notice",
    "ProbeLike",
    "Probed",
    "Queued",
    "RunOptions",
    "RunResult",
    "RunStream",
    "RunsStream",
    "SampleLike",
    "Samples",
    "Started",
    "StateSaved",
    "Step",
    "Stream",
    "happened",
    "read_probes",
    "read_samples",
    "run_spec",
    "to_probe",
    "to_sample",
    "to_samples",
]
