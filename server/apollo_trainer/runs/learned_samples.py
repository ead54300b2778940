"""The samples that a run learns: those of its spec, or of the dataset that it names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from apollo_grpc.errors import InvalidArgument, NotFound
from apollo_grpc.v1 import training_pb2 as pb
from apollo_trainer.datasets import DatasetStore
from apollo_trainer.requests.samples import Use

_FIELD = "spec.dataset_id"


def learned_samples(
    spec: pb.RunSpec, use: Use, datasets: DatasetStore | None
) -> tuple[Collection[pb.Sample], Use]:
    """The samples, read from the disk as they are gone through, and the use with their path.

    Args:
        datasets: where a dataset is looked up; None where there are none.

    Raises InvalidArgument where the spec has both, NotFound for a dataset that is not there,
    DataLoss for one whose file is damaged, also when it is gone through.
    """
    if not spec.dataset_id:
        return spec.samples, use
    if spec.samples:
        raise InvalidArgument.at(_FIELD, "is set beside spec.samples; a run learns one of them")
    require_dataset(spec, datasets)
    assert datasets is not None
    stored = replace(use, path=f"{_FIELD}[{{}}]", counted=False)
    return datasets.samples(spec.dataset_id), stored


def require_dataset(spec: pb.RunSpec, datasets: DatasetStore | None) -> None:
    """Raises NotFound where the spec names a dataset that is not there, DataLoss likewise."""
    if not spec.dataset_id:
        return
    try:
        if datasets is None:
            raise NotFound("This server keeps no datasets.", reason="DATASET_NOT_FOUND")
        datasets.get(spec.dataset_id)
    except NotFound as error:
        raise NotFound(
            f"{_FIELD}: {error.message}",
            reason=error.reason,
            metadata={"field": _FIELD},
            resource=error.resource,
        ) from None
