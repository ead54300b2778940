"""A run of a file's samples, also of more than one request holds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from apollo_client.client import ApolloClient
from apollo_client.command.latest_line import counted, latest_line
from apollo_client.command.run_display import follow
from apollo_client.placing import MAX_SAMPLES_BYTES, Placed, in_user_words
from apollo_grpc.errors import ApolloError
from apollo_grpc.v1 import training_pb2 as pb

# Of a run that brings its samples itself, unless its server is told otherwise.
MAX_SAMPLES = 10_000


def learn(
    client: ApolloClient,
    samples: Sequence[Placed[pb.Sample]],
    request_id: str | None,
    options: Any,
    as_json: bool,
) -> None:
    """Starts a run and shows it until its end; brings the samples as a dataset where they are many.

    Raises what the server refuses, with the lines of the file that the samples are of.
    """
    size = sum(placed.value.ByteSize() for placed in samples)
    if len(samples) <= MAX_SAMPLES and size <= MAX_SAMPLES_BYTES:
        follow(client.train(samples, request_id=request_id, **options), as_json)
        return
    file = PurePath(samples[0].place.rpartition(":")[0]).name
    with latest_line("reading") as show:
        made = client.create_dataset(counted(samples, show), name=file)
    print(
        f"apollo: {file} holds more than one request does: its {made.samples} samples are dataset "
        f"{made.dataset_id}, which stays until 'apollo datasets delete'",
        file=sys.stderr,
    )
    try:
        events = client.train(request_id=request_id, dataset_id=made.dataset_id, **options)
        follow(events, as_json)
    except ApolloError as error:
        raise in_user_words(error, {"spec.dataset_id": [each.place for each in samples]}) from None
