"""Samples that are kept for runs."""

from __future__ import annotations

import hashlib
import struct
import uuid
from collections.abc import Sequence

import grpc

from apollo_client.conformance.paging import require_newest_first
from apollo_client.conformance.promises import Level, promise
from apollo_client.conformance.refusals import refusal_of
from apollo_client.conformance.requirements import BrokenPromiseError, require, require_equal
from apollo_client.conformance.server import Server, sample, steps_of
from apollo_grpc.v1 import dataset_pb2
from apollo_grpc.v1 import training_pb2 as pb

Part = dataset_pb2.CreateDatasetRequest
NOT_FOUND = grpc.StatusCode.NOT_FOUND, "DATASET_NOT_FOUND"
IN_USE = grpc.StatusCode.FAILED_PRECONDITION, "DATASET_IN_USE"


@promise(Level.WRITE, trains=False)
def a_dataset_is_kept(server: Server) -> None:
    """CreateDataset brings samples in many messages and keeps them; GetDataset returns them."""
    samples = _samples(5)
    made = _bring(server, [samples[:2], samples[2:]], server.tag)
    require_equal((made.name, made.samples), (server.tag, 5), "name and samples")
    require_equal(_get(server, made.dataset_id), made, "GetDataset")
    found = server.ask(dataset_pb2.ListDatasetsRequest(page_size=1000)).datasets
    require(made in found, "ListDatasets does not have it")


@promise(Level.WRITE, trains=False)
def the_same_samples_are_the_same_dataset(server: Server) -> None:
    """The same samples are the same dataset, however they are divided; the first one's name."""
    samples = _samples(4)
    made = _bring(server, [samples], "first")
    require_equal(_bring(server, [samples[:1], samples[1:]], "second"), made, "the second")


@promise(Level.WRITE, trains=False)
def the_digest_is_of_the_samples(server: Server) -> None:
    """`digest` is the SHA-256 of sizes and samples, `dataset_id` its first 32 digits."""
    samples = _samples(3)
    made = _bring(server, [samples])
    whole = hashlib.sha256()
    for data in (each.SerializeToString() for each in samples):
        whole.update(struct.pack("<I", len(data)) + data)
    require_equal(made.digest, whole.hexdigest(), "digest")
    require_equal(made.dataset_id, made.digest[:32], "dataset_id")


@promise(Level.WRITE, trains=False)
def wrong_samples_are_named_by_their_place_in_the_whole(server: Server) -> None:
    """INVALID_ARGUMENT: a sample is wrong, by its place in the whole; nothing is kept."""
    samples, name = _samples(2), server.name()
    parts = [Part(name=name, samples=samples), Part(samples=[samples[0], pb.Sample()])]
    try:
        server.ask(*parts)
    except grpc.RpcError as error:
        found = refusal_of(error, "CreateDataset")
    else:
        raise BrokenPromiseError("a sample without content is taken")
    require_equal(found.code, grpc.StatusCode.INVALID_ARGUMENT, "the code")
    require_equal(found.fields, ["samples[3]"], "wrong fields")
    kept = server.ask(dataset_pb2.ListDatasetsRequest(page_size=1000)).datasets
    require(name not in {each.name for each in kept}, "it is kept")


@promise(Level.WRITE, trains=False)
def pages_of_datasets_join_to_the_whole(server: Server) -> None:
    """ListDatasets lists newest first; its pages join to the whole."""
    made = [_bring(server, [_samples(1)]).dataset_id for _ in range(3)]
    request = dataset_pb2.ListDatasetsRequest()
    require_newest_first(server, request, "datasets", "dataset_id", made)


@promise(Level.WRITE)
def a_run_of_a_dataset_is_one_of_its_samples(server: Server) -> None:
    """`dataset_id`: the samples that CreateDataset brought, in place of `samples`."""
    samples = _samples(3)
    made = _bring(server, [samples])
    sent = steps_of(server.train(samples=samples))
    named = steps_of(server.train(dataset_id=made.dataset_id))
    require_equal([s.tokens for s in named], [s.tokens for s in sent], "tokens of the steps")
    apart = [abs(one.loss - other.loss) for one, other in zip(sent, named, strict=True)]
    require(max(apart) < 1e-2, f"losses that differ by {apart}")


@promise(Level.WRITE)
def a_dataset_in_use_is_not_deleted(server: Server) -> None:
    """FAILED_PRECONDITION (DATASET_IN_USE): a run that has not ended needs it."""
    made = _bring(server, [_samples(2)])
    request = dataset_pb2.DeleteDatasetRequest(dataset_id=made.dataset_id)
    with server.long(dataset_id=made.dataset_id):
        server.refused(request, *IN_USE)


@promise(Level.WRITE, trains=False)
def a_deleted_dataset_is_gone(server: Server) -> None:
    """DeleteDataset deletes a dataset: it is not found."""
    made = _bring(server, [_samples(2)])
    server.ask(dataset_pb2.DeleteDatasetRequest(dataset_id=made.dataset_id))
    for kind in (dataset_pb2.GetDatasetRequest, dataset_pb2.DeleteDatasetRequest):
        server.refused(kind(dataset_id=made.dataset_id), *NOT_FOUND)


def _samples(count: int) -> list[pb.Sample]:
    """Samples that no other dataset has: they weigh what nothing else does."""
    weight = 1 + uuid.uuid4().int / 2**128
    return [pb.Sample(tokens=sample(n + 1).tokens, weight=weight) for n in range(count)]


def _bring(
    server: Server, parts: Sequence[Sequence[pb.Sample]], name: str = ""
) -> dataset_pb2.Dataset:
    requests = [Part(samples=part) for part in parts]
    requests[0].name = name
    made: dataset_pb2.Dataset = server.ask(*requests).dataset
    server.at_end.append(dataset_pb2.DeleteDatasetRequest(dataset_id=made.dataset_id))
    return made


def _get(server: Server, dataset_id: str) -> dataset_pb2.Dataset:
    request = dataset_pb2.GetDatasetRequest(dataset_id=dataset_id)
    found: dataset_pb2.Dataset = server.ask(request).dataset
    return found
