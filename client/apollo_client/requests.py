"""Requests, built once for both clients."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from apollo_client.connection import message
from apollo_client.data import Columns, Probes, Samples, items_of
from apollo_client.fields import duration, put
from apollo_client.forms import PROBES, SAMPLES, Form
from apollo_client.placing import Place, Places, require_room
from apollo_client.sample_values import shown, written
from apollo_grpc.errors import InvalidArgument
from apollo_grpc.v1 import status_pb2, training_pb2


class RunOptions(TypedDict, total=False):
    """What a run may be told; what is left out keeps the default of `training.proto`.

    The first ones are of the run (RunSpec and what it holds), those from `lr` on of APOLLO
    (OptimizerConfig). Enums are words in lower case: `coherence` is "live", "pause_step" or
    "pause_run". `max_wall_time` is in seconds. `loss` is "cross_entropy", "context_distillation",
    which `top_k` is for, or "policy_gradient", which `clip_low` and `clip_high` are for.
    `anchor_loss` is "kl" or "replay"; `regression_set`: that of the model is an anchor as well.
    `self_made` holds fields of SelfMadeAnchors, `accept_if` those of AcceptIf; True is their
    defaults.
    """

    epochs: int
    samples_per_step: int
    seed: int
    dry_run: bool
    evaluate: bool
    evaluation_samples: Samples
    evaluate_every_steps: int
    max_wall_time: float
    coherence: str
    cache_policy: str
    max_loss: float
    max_grad_norm: float
    max_update_ratio: float
    min_loss: float
    loss: str
    top_k: int
    clip_low: float
    clip_high: float
    anchors: Samples
    anchor_loss: str
    anchor_weight: float
    anchors_per_step: int
    regression_set: bool
    self_made: Mapping[str, int] | bool
    probes: Probes
    accept_if: Mapping[str, Any] | bool
    include: Iterable[str]
    exclude: Iterable[str]
    layers: Iterable[int]
    context_gradient_tokens: int
    dataset_id: str
    expected_weight_version: int
    name: str
    labels: Mapping[str, str]
    lr: float
    rank: int
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    warmup_steps: int
    schedule: str
    final_lr_fraction: float
    clip_grad_norm: float
    scale: float
    variant: str
    rounding: str
    proj_refresh: int
    norm_growth_limit: float
    reset_optimizer: bool
    accept_other_weights: bool


_LOSSES = ("cross_entropy", "context_distillation", "policy_gradient")
# What is a list of samples or probes, and how one is written.
LISTS: dict[str, Form[Any]] = {
    "samples": SAMPLES,
    "evaluation_samples": SAMPLES,
    "anchors": SAMPLES,
    "probes": PROBES,
}
# Lists whose records have the names that `columns` tells.
_IN_COLUMNS = ("samples", "evaluation_samples")
# Where an option's field is, unless the run or the optimizer has one of the option's name.
_FIELDS = {
    "coherence": "coherence.mode",
    "cache_policy": "coherence.cache_policy",
    "max_loss": "guard.max_loss",
    "max_grad_norm": "guard.max_grad_norm",
    "max_update_ratio": "guard.max_update_ratio",
    "min_loss": "guard.min_loss",
    "top_k": "context_distillation.top_k",
    "clip_low": "policy_gradient.clip_low",
    "clip_high": "policy_gradient.clip_high",
    "anchors": "anchors.samples",
    "anchor_loss": "anchors.loss",
    "anchor_weight": "anchors.weight",
    "anchors_per_step": "anchors.samples_per_step",
    "regression_set": "anchors.regression_set",
    "include": "parameters.include",
    "exclude": "parameters.exclude",
    "layers": "parameters.layers",
}


def run_spec(
    samples: Samples, options: RunOptions, columns: Columns = None
) -> training_pb2.RunSpec:
    """The spec of a run. Raises InvalidArgument for what cannot be put into one.

    Whether the values make sense is the server's to say: it knows the model.
    """
    return placed_spec(samples, options, columns)[0]


def placed_spec(
    samples: Samples, options: RunOptions, columns: Columns = None
) -> tuple[training_pb2.RunSpec, Places]:
    """The same, and where its samples and probes come from."""
    spec, places = training_pb2.RunSpec(), dict[str, list[Place]]()
    given = {name: value for name, value in options.items() if value is not None}
    if unknown := [name for name in given if name not in RunOptions.__annotations__]:
        raise InvalidArgument.at(shown(unknown[0]), "is no option of a run")
    for name, items in [("samples", samples), *given.items()]:
        if name in LISTS:
            form = LISTS[name].of_columns(columns if name in _IN_COLUMNS else None)
            items = items_of(items, form)
            found, places[f"spec.{_FIELDS.get(name, name)}"] = form.all_of(name, items)
            if found:  # An empty list is as if it were missing.
                owner, field = _home(spec, name)
                getattr(owner, field).extend(found)
    _put_loss(spec, given)
    _put_fields(spec, "accept_if", given.pop("accept_if", False))
    _put_fields(spec.anchors, "self_made", given.pop("self_made", False))
    for name, value in given.items():
        if name not in LISTS:
            put(*_home(spec, name), value, name)
    return spec, places


def placed_samples(
    samples: Samples, columns: Columns = None
) -> tuple[list[training_pb2.Sample], Places]:
    """Samples of a request that is no run's, and where they come from."""
    form = SAMPLES.of_columns(columns)
    found, places = form.all_of("samples", items_of(samples, form))
    return found, {"samples": places}


def _home(spec: training_pb2.RunSpec, name: str) -> tuple[Any, str]:
    """The message that has an option's field, and the field."""
    owner, _, field = _FIELDS.get(name, name).rpartition(".")
    if owner or field in spec.DESCRIPTOR.fields_by_name:
        return getattr(spec, owner) if owner else spec, field
    return spec.optimizer, field


def _put_loss(spec: training_pb2.RunSpec, given: dict[str, Any]) -> None:
    named = given.pop("loss", None)
    if named is not None:
        if named not in _LOSSES:
            says = f"cannot be {written(named)}; it is one of {', '.join(_LOSSES)}"
            raise InvalidArgument.at("loss", says)
        getattr(spec, named).SetInParent()
    for name in given:
        owner = _FIELDS.get(name, "").partition(".")[0]
        # A spec has one loss: another one's option would take its place.
        if owner in _LOSSES and owner != named:
            raise InvalidArgument.at(name, f"is for the loss {owner} alone")


def _put_fields(owner: Any, name: str, given: Any) -> None:
    """Sets a message of an owner from its fields, from True, or not at all."""
    if given is False:
        return
    target = getattr(owner, name)
    if given is not True and not isinstance(given, Mapping):
        raise InvalidArgument.at(name, f"is neither True nor fields of {target.DESCRIPTOR.name}")
    target.SetInParent()
    known = [field.name for field in target.DESCRIPTOR.fields]
    for field, value in {} if given is True else given.items():
        if field not in known:
            raise InvalidArgument.at(f"{name}.{shown(field)}", f"is none of {', '.join(known)}")
        if value is not None:
            put(target, field, value, f"{name}.{field}")


def train_request(
    spec: training_pb2.RunSpec, request_id: str | None, places: Places | None = None
) -> training_pb2.TrainRequest:
    """A request that may be sent again: with an id of its own where none is given.

    Raises InvalidArgument for more samples than one holds, with those of `places` that would fit.
    """
    request = message(training_pb2.TrainRequest, request_id=request_id or uuid.uuid4().hex)
    request.spec.CopyFrom(spec)
    require_room(request, places or {})
    return request


def create_request(
    spec: training_pb2.RunSpec, request_id: str | None, places: Places
) -> training_pb2.CreateRunRequest:
    """The request to create a run. Raises as `train_request`."""
    made = train_request(spec, request_id, places)
    return training_pb2.CreateRunRequest(request_id=made.request_id, spec=made.spec)


def validate_request(spec: training_pb2.RunSpec, places: Places) -> training_pb2.ValidateRunRequest:
    """The request to check a run. Raises as `train_request`."""
    return training_pb2.ValidateRunRequest(spec=train_request(spec, None, places).spec)


def list_request(
    page_size: int,
    page_token: str,
    states: Iterable[str | int],
    labels: Mapping[str, str] | None = None,
    name: str = "",
    oldest_first: bool = False,
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
        request = training_pb2.ListRunsRequest(
            page_size=page_size,
            page_token=page_token,
            states=[training_pb2.RunState.ValueType(number) for number in numbers],
        )
    except (TypeError, ValueError) as error:
        raise InvalidArgument.at("states", f"cannot be {list(states)}: {error}") from error
    put(request, "labels", labels or {})
    put(request, "name", name)
    if oldest_first:
        request.order = training_pb2.RUN_ORDER_OLDEST_FIRST
    return request


def watch_request(run_id: str, min_interval: float) -> status_pb2.WatchStatusRequest:
    """The request of a subscription; `min_interval` is in seconds."""
    request = message(status_pb2.WatchStatusRequest, run_id=run_id)
    request.min_interval.CopyFrom(duration("min_interval", min_interval))
    return request


def delete_probes_request(
    names: Iterable[str] | None,
) -> training_pb2.DeleteRegressionProbesRequest:
    """The request to take these out of the regression set, or all of them for None."""
    request = training_pb2.DeleteRegressionProbesRequest()
    if names is not None:
        put(request, "names", names)
    return request
