"""The optimizer's state as flat named tensors and plain metadata, and the checks before a load.

Tensors are called "<part>.<parameter>", such as "m.model.norm.weight". Whatever is refused is
refused before the first tensor is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from apollo_trainer.optim.options import GROUP_OPTIONS, NO_SCHEDULE, check_group
from apollo_trainer.optim.parameters import Slot

FORMAT = "apollo-optimizer"
VERSION = 1
_SCALAR = (bool, int, float, str, type(None))
_REQUIRED = (
    "format", "version", "seed", "step_count", "skipped_nonfinite", "variant", "rounding",
    "compat", "parameters", "param_groups",
)  # fmt: skip


def tensor_name(part: str, parameter: str) -> str:
    """The flat name of one tensor of one parameter's state."""
    return f"{part}.{parameter}"


def describe(slot: Slot) -> dict[str, Any]:
    """Shape, dtype and rank of one parameter; None is the rank of plain Adam."""
    dtype = str(slot.param.dtype).removeprefix("torch.")
    return {"shape": list(slot.root), "dtype": dtype, "rank": slot.rank}


def describe_group(group: Mapping[str, Any]) -> dict[str, Any]:
    """The names and the scalar settings of one group; what a scheduler added is kept too."""
    found: dict[str, Any] = {}
    for key, value in group.items():
        if isinstance(value, _SCALAR):
            found[key] = value
        elif isinstance(value, tuple | list) and all(isinstance(v, _SCALAR) for v in value):
            found[key] = list(value)
    return found


def check_meta(meta: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raises ValueError unless the metadata is whole, of this version, and for these options."""
    missing = [key for key in _REQUIRED if key not in meta]
    if missing or meta["format"] != FORMAT:
        raise _refusal(f"it is not a state of this optimizer (missing: {missing})")
    if meta["version"] != VERSION:
        raise _refusal(f"its version is {meta['version']!r}, and this code reads {VERSION}")
    for key in ("seed", "step_count", "skipped_nonfinite"):
        if isinstance(meta[key], bool) or not isinstance(meta[key], int) or meta[key] < 0:
            raise _refusal(f"its {key} is {meta[key]!r}, not a whole number")
    for key in ("variant", "compat"):
        if meta[key] != expected[key]:
            raise _refusal(f"{key} is {meta[key]!r} there and {expected[key]!r} here")
    if (meta["rounding"] == "split16") != (expected["rounding"] == "split16"):
        raise _refusal(f"rounding is {meta['rounding']!r} there and {expected['rounding']!r} here")


def contents(slots: Iterable[Slot], groups: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The metadata's part on the format, the parameters and the groups."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "parameters": {slot.name: describe(slot) for slot in slots},
        "param_groups": [describe_group(group) for group in groups],
    }


def check_parameters(meta: Mapping[str, Any], slots: Iterable[Slot]) -> None:
    """Raises ValueError naming the first parameter that differs in name, shape, dtype or rank."""
    here, there = {s.name: describe(s) for s in slots}, dict(meta["parameters"])
    for name in here.keys() | there.keys():
        if name not in there:
            raise _refusal(f"parameter {name!r} is not in it")
        if name not in here:
            raise _refusal(f"it has parameter {name!r}, which this optimizer does not have")
        for key, value in here[name].items():
            if there[name].get(key) != value:
                raise _refusal(f"{name!r} has {key} {there[name].get(key)} there, {value} here")


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError naming the first tensor that is missing, left over or of another kind.

    A moment in bfloat16 is refused: at beta2 0.999 it would never decay.
    """
    for name in expected.keys() | tensors.keys():
        if name not in tensors:
            raise _refusal(f"tensor {name!r} is missing")
        if name not in expected:
            raise _refusal(f"tensor {name!r} belongs to no parameter of this optimizer")
        found, wanted = tensors[name], expected[name]
        if not isinstance(found, Tensor):
            raise _refusal(f"{name!r} is not a tensor")
        if found.dtype != wanted.dtype:
            raise _refusal(f"tensor {name!r} is {found.dtype}, and {wanted.dtype} is needed")
        if found.shape != wanted.shape:
            raise _refusal(f"tensor {name!r} is {list(found.shape)}, not {list(wanted.shape)}")


def check_groups(meta: Mapping[str, Any], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the saved settings of each group. Raises ValueError where they do not fit."""
    saved = meta["param_groups"]
    if len(saved) != len(groups):
        raise _refusal(f"it has {len(saved)} parameter groups, and this optimizer {len(groups)}")
    found = []
    for n, (saved_group, here) in enumerate(zip(saved, groups, strict=True)):
        there = NO_SCHEDULE | saved_group
        stray = set(there.get("param_names", ())) ^ set(here["param_names"])
        if stray:
            raise _refusal(f"parameter {min(stray)!r} is not in group {n} on both sides")
        missing = [key for key in GROUP_OPTIONS if key not in there]
        if missing:
            raise _refusal(f"group {n} has no {missing[0]}")
        settings = {k: v for k, v in there.items() if k not in ("params", "param_names")}
        settings["betas"] = tuple(settings["betas"])
        try:
            check_group(settings)
        except ValueError as error:
            raise _refusal(f"in group {n}, {error}") from error
        found.append(settings)
    return found


def torch_groups(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Group settings with the positions of their parameters, as torch's state_dict has them."""
    packed, first = [], 0
    for group in groups:
        count = len(group["params"])
        packed.append({**describe_group(group), "params": list(range(first, first + count))})
        first += count
    return packed


def _refusal(why: str) -> ValueError:
    return ValueError(
        f"The optimizer state was not loaded: {why}. Nothing was changed. Load the state of "
        "this model and these options, or start without one."
    )


def pack(
    tensors: Mapping[str, Tensor], meta: dict[str, Any], groups: list[dict[str, Any]]
) -> dict[str, Any]:
    """What `Apollo.state_dict` gives, of what `Apollo.named_state` gave."""
    meta = {key: value for key, value in meta.items() if key != "param_groups"}
    return {"state": tensors, "param_groups": torch_groups(groups), "apollo": meta}


def unpack(state_dict: Mapping[str, Any]) -> tuple[Mapping[str, Tensor], dict[str, Any]]:
    """Tensors and metadata of what `Apollo.state_dict` gave; raises ValueError on another's."""
    missing = {"state", "param_groups", "apollo"} - state_dict.keys()
    if missing:
        raise ValueError(
            f"The optimizer state was not loaded: it has no {min(missing)!r}, so it is not one of "
            "this optimizer. Nothing was changed."
        )
    meta = {**state_dict["apollo"], "param_groups": state_dict["param_groups"]}
    return state_dict["state"], meta
