"""Requests, built once for both clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

from google.protobuf import duration_pb2

from apollo_client.connection import message
from apollo_client.placing import Place, Violations, require_room
from apollo_client.samples import PlacedSample, SampleLike, to_samples
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import status_pb2, training_pb2


class RunOptions(TypedDict, total=False):
    """What a run may be told; what is left out keeps the default of `training.proto`.

    The first ones are of the run (RunSpec, its Coherence and its Guard), those from `lr` on of
    APOLLO (OptimizerConfig). `coherence` is "live", "pause_step" or "pause_run", `cache_policy`
    "reset_at_end", "reset_each_step" or "keep"; `max_wall_time` is in seconds.
    """

    epochs: int
    samples_per_step: int
    seed: int
    dry_run: bool
    evaluate: bool
    max_wall_time: float
    coherence: str
    cache_policy: str
    max_loss: float
    max_grad_norm: float
    max_update_ratio: float
    min_loss: float
    lr: float
    rank: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup_steps: int
    scale: float
    proj_refresh: int
    norm_growth_limit: float
    reset_optimizer: bool
    accept_other_weights: bool


_RUN_FIELDS = ("epochs", "samples_per_step", "seed", "dry_run", "evaluate")
_GUARD_FIELDS = ("max_loss", "max_grad_norm", "max_update_ratio", "min_loss")


def run_spec(samples: Iterable[SampleLike], options: RunOptions) -> training_pb2.RunSpec:
    """The spec of a run. Raises InvalidArgument for what cannot be put into one.

    Whether the values make sense is the server's to say: it knows the model.
    """
    return placed_spec(samples, options)[0]


def placed_spec(
    samples: Iterable[SampleLike], options: RunOptions
) -> tuple[training_pb2.RunSpec, list[Place]]:
    """The same, and where each of its samples comes from."""
    spec, places = training_pb2.RunSpec(), list[Place]()
    for sample, place in _each(samples):
        spec.samples.append(sample)
        places.append(place)
    for name, value in options.items():
        if value is not None:
            _put(spec, name, value)
    return spec, places


def _put(spec: training_pb2.RunSpec, name: str, value: Any) -> None:
    if name in _RUN_FIELDS:
        _set(spec, name, value)
    elif name in _GUARD_FIELDS:
        _set(spec.guard, name, value)
    elif name == "max_wall_time":
        spec.max_wall_time.CopyFrom(_duration(name, value))
    elif name == "coherence":
        mode = _named(name, training_pb2.CoherenceMode, f"COHERENCE_MODE_{value}".upper(), value)
        spec.coherence.mode = training_pb2.CoherenceMode.ValueType(mode)
    elif name == "cache_policy":
        policy = _named(name, training_pb2.CachePolicy, f"CACHE_POLICY_{value}".upper(), value)
        spec.coherence.cache_policy = training_pb2.CachePolicy.ValueType(policy)
    else:
        _set(spec.optimizer, name, value)


def _duration(name: str, seconds: float) -> duration_pb2.Duration:
    length = duration_pb2.Duration()
    try:
        length.FromNanoseconds(int(seconds * 1e9))
    except (ArithmeticError, TypeError, ValueError) as error:
        raise InvalidArgument.at(name, f"cannot be {seconds!r} seconds: {error}") from error
    return length


def _named(name: str, enum: Any, full: str, value: object) -> int:
    if full not in enum.keys():  # noqa: SIM118
        prefix = full[: -len(str(value))]
        known = [word.removeprefix(prefix).lower() for word in enum.keys()[1:]]
        raise InvalidArgument.at(name, f"cannot be {value!r}; it is one of {', '.join(known)}")
    return int(enum.Value(full))


def _each(samples: Iterable[SampleLike]) -> Iterable[tuple[training_pb2.Sample, Place]]:
    if isinstance(samples, str | bytes | Mapping) or not isinstance(samples, Iterable):
        raise InvalidArgument.at(
            "samples", "is no list of samples; 'read_samples' makes one of a file"
        )
    wrong = Violations()
    for index, item in enumerate(samples):
        place: Place = item.place if isinstance(item, PlacedSample) else index
        try:
            for sample in to_samples(item):
                yield sample, place
        except InvalidArgument as error:
            wrong.add(f"samples[{index}]", error.message)
            if wrong.is_full():
                break
    wrong.raise_any("samples")


def _set(message: Any, name: str, value: object) -> None:
    if name not in message.DESCRIPTOR.fields_by_name:
        raise InvalidArgument.at(name, "is no option of a run")
    try:
        setattr(message, name, value)
    except (TypeError, ValueError) as error:
        raise InvalidArgument.at(name, f"cannot be {value!r}: {error}") from error


def train_request(
    spec: training_pb2.RunSpec, request_id: str | None, places: Sequence[Place] = ()
) -> training_pb2.TrainRequest:
    """A request that may be sent again: with an id of its own where none is given.

    Raises InvalidArgument for more samples than one holds, with those of `places` that would fit.
    """
    request = message(training_pb2.TrainRequest, request_id=request_id or uuid.uuid4().hex)
    request.spec.CopyFrom(spec)
    require_room(request, places)
    return request


def list_request(
    page_size: int, page_token: str, states: Iterable[str | int]
) -> training_pb2.ListRunsRequest:
    """The request of a page of runs; states by number or by name, as `FAILED`.

    Raises InvalidArgument for a name that is none.
    """
    try:
        numbers = [
            training_pb2.RunState.Value(f"RUN_STATE_{state.upper()}")
            if isinstance(state, str)
            else state
            for state in states
        ]
        return training_pb2.ListRunsRequest(
            page_size=page_size,
            page_token=page_token,
            states=[training_pb2.RunState.ValueType(number) for number in numbers],
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument.at("states", f"cannot be {list(states)}: {error}") from error


def watch_request(run_id: str, min_interval: float) -> status_pb2.WatchStatusRequest:
    """The request of a subscription; `min_interval` is in seconds."""
    request = message(status_pb2.WatchStatusRequest, run_id=run_id)
    request.min_interval.CopyFrom(_duration("min_interval", min_interval))
    return request
