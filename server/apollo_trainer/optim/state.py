"""An optimizer's parameters and their state, and the state as named tensors for a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from apollo_grpc.region import Region
from apollo_trainer.optim import named_state
from apollo_trainer.optim.cuda.kinds import agree_on_alignment
from apollo_trainer.optim.options import CHOICES, Compat, Variant, check_group
from apollo_trainer.optim.parameters import Slot, named, new_state, sort_out
from apollo_trainer.optim.rounding import RoundingMode
from apollo_trainer.parallel.parts import gathered, part_of
from apollo_trainer.parallel.ranks import Ranks


class StatefulOptimizer(Optimizer):
    """Holds parameters and their state, saves and loads it; `Apollo` adds the step.

    Arguments and attributes are those of `Apollo`.

    Args:
        defaults: settings for groups that do not set their own; already checked.
    """

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        seed: int,
        variant: Variant,
        rounding: RoundingMode,
        compat: Compat | None,
        regions: Mapping[str, Region],
        ranks: Ranks,
    ) -> None:
        self.seed = seed
        self.variant: Variant = variant
        self.rounding: RoundingMode = rounding
        self.compat: Compat | None = compat
        self.regions, self.ranks = regions, ranks
        self.step_count = self.weights = 0
        self.wrote = False
        self._slots: list[Slot] = []
        self._skipped_before = 0
        self._skipped: dict[torch.device, Tensor] = {}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group and allocates its state. Raises ValueError, and then adds nothing."""
        own = sorted({*CHOICES, "seed"} & param_group.keys())
        if own:
            raise ValueError(f"{own[0]} belongs to the whole optimizer, not to a group.")
        check_group({**self.defaults, **param_group})
        if isinstance(param_group["params"], set):
            raise TypeError("params is a set, whose order changes between runs; pass a list.")
        rank = param_group.get("rank", self.defaults["rank"])
        pairs = named(param_group["params"], len(self._slots))
        new, ties = sort_out(
            pairs, self._slots, len(self.param_groups), rank=rank, mode=self.rounding,
            regions=self.regions,
        )  # fmt: skip
        if self.compat is not None and any(slot.cut is not None for slot in new):
            raise ValueError(f"compat={self.compat!r} has no steps of ranks together.")
        super().add_param_group(
            {
                **param_group,
                "params": [slot.param for slot in new],
                "param_names": [slot.name for slot in new],
            }
        )
        agree_on_alignment(new, self.ranks)
        for slot in new:
            slot.set_seed(self.seed)
            self.weights += math.prod(slot.root)
            self.state[slot.param] = new_state(slot, self.rounding)
        self._slots += new
        for tensor, slot in ties:
            slot.aliases.append(tensor)

    @property
    def tensors(self) -> list[Tensor]:
        """All that it was given: parameters, and tensors tied to them."""
        return [tensor for slot in self._slots for tensor in (slot.param, *slot.aliases)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Releases or zeroes the gradients, those of tied tensors included."""
        super().zero_grad(set_to_none)
        for slot in self._slots:
            for alias in slot.aliases:
                if set_to_none:
                    alias.grad = None
                elif alias.grad is not None:
                    alias.grad.zero_()

    @property
    def skipped_nonfinite(self) -> int:
        """Gradients skipped so far because they were not finite. Waits for the devices."""
        return self._skipped_before + sum(int(n.item()) for n in self._skipped.values())

    def _count_skipped(self, skipped: Tensor) -> None:
        if skipped.device in self._skipped:
            self._skipped[skipped.device] += skipped
        else:
            self._skipped[skipped.device] = skipped.to(torch.int64)

    def state_size_bytes(self) -> int:
        """Bytes of all state tensors; the same from construction on."""
        return sum(t.nbytes for t in self.named_tensors().values())

    def named_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The state for a file: flat tensors, and metadata that JSON can hold.

        Tensors are the live ones, not copies, but for those that ranks divide, which are whole, and
        all of the same on every rank. They are called `m.<parameter>`, `v.<parameter>`,
        `step.<parameter>`, and where they exist `norm.<parameter>` and `low.<parameter>`.
        """
        meta = self.description()
        self.ranks.tell("state")
        regions = self.state_regions()
        own = self.named_tensors()
        return {n: gathered(tensor, regions[n], self.ranks) for n, tensor in own.items()}, meta

    def state_to_save(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `named_state` gives, and before the first write, while it is all zero, no tensors.

        The first step of all waits until its state is on disk.
        """
        begun = self.step_count or self.wrote
        return self.named_state() if begun else ({}, self.description())

    def description(self) -> dict[str, Any]:
        """The metadata of `named_state`; the same on every rank."""
        return {
            "seed": self.seed,
            "step_count": self.step_count,
            "skipped_nonfinite": self.skipped_nonfinite,
            **self._choices(),
            **named_state.contents(self._slots, self.param_groups),
        }

    def load_named_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Takes over what `named_state` gave: moments, counters, seed and group settings.

        Without any tensors it is a state at step 0, whose tensors are all zero.

        Raises ValueError naming the parameter where the state is of another model or of other
        options; the optimizer is then as it was.
        """
        self.check_named_state(tensors, meta)
        regions = self.state_regions()
        with torch.no_grad():
            for name, tensor in self.named_tensors().items():
                if not tensors:
                    tensor.zero_()
                elif tensors[name] is not tensor:
                    tensor.copy_(part_of(tensors[name], regions[name]))
        self.adopt(meta)

    def adopt(self, meta: Mapping[str, Any]) -> None:
        """Takes over counters, seed and group settings of metadata that was checked."""
        groups = named_state.check_groups(meta, self.param_groups)
        for group, settings in zip(self.param_groups, groups, strict=True):
            group.update(settings)
        self.seed, self.step_count = meta["seed"], meta["step_count"]
        self._skipped_before, self._skipped = meta["skipped_nonfinite"], {}
        for slot in self._slots:
            slot.set_seed(self.seed)

    def check_named_state(self, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
        """Raises as `load_named_state` does, and changes nothing."""
        named_state.check_meta(meta, self._choices())
        named_state.check_parameters(meta, self._slots)
        named_state.check_groups(meta, self.param_groups)
        if not tensors and meta["step_count"] == 0:
            return
        regions = self.state_regions()
        own = self.named_tensors().items()
        wanted = {n: t.new_empty(regions[n].root, device="meta") for n, t in own}
        named_state.check_tensors(tensors, wanted)

    def state_dict(self) -> dict[str, Any]:
        """The state as tensors and scalars: `torch.load(weights_only=True)` reads it back."""
        return named_state.pack(*self.named_state(), self.param_groups)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes over what `state_dict` gave; raises as `load_named_state` does."""
        self.load_named_state(*named_state.unpack(state_dict))

    def _choices(self) -> dict[str, Any]:
        """Options that a state is checked against before it is loaded."""
        return {"variant": self.variant, "rounding": self.rounding, "compat": self.compat}

    def state_regions(self) -> dict[str, Region]:
        """Which part of the whole each tensor of `named_tensors` is."""
        return {
            named_state.tensor_name(part, slot.name): slot.region_of(part)
            for slot in self._slots
            for part in self.state[slot.param]
        }

    def named_tensors(self) -> dict[str, Tensor]:
        """The live state tensors of this rank, by the names that `named_state` has."""
        return {
            named_state.tensor_name(part, slot.name): tensor
            for slot in self._slots
            for part, tensor in self.state[slot.param].items()
        }
