"""APOLLO as a torch optimizer: AdamW's learning rates at a fraction of AdamW's state.

Source: Zhu et al., "APOLLO: SGD-like Memory, AdamW-level Performance", arXiv 2412.05270,
Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from apollo_grpc.region import Region
from apollo_trainer.optim import cpu, paths
from apollo_trainer.optim.change import Change
from apollo_trainer.optim.cuda import FusedStepper, Work
from apollo_trainer.optim.factored import Gradient, norm_of
from apollo_trainer.optim.options import (
    NO_SCHEDULE,
    Compat,
    Impl,
    StepSettings,
    Variant,
    check_choices,
    check_group,
    settings_for,
)
from apollo_trainer.optim.parameters import Slot
from apollo_trainer.optim.reference import Job
from apollo_trainer.optim.rounding import Rounding, RoundingMode
from apollo_trainer.optim.state import StatefulOptimizer
from apollo_trainer.optim.together import step_parameters
from apollo_trainer.parallel.parts import NO_REGIONS
from apollo_trainer.parallel.ranks import ALONE, Ranks


class Apollo(StatefulOptimizer):
    """APOLLO (arXiv 2412.05270, Algorithm 1), with states in float32 and weights written in place.

    Matrices [a, b] with min(a, b) >= rank are scaled channel by channel with factors learned in a
    random space of `rank` dimensions. Stacks [E, a, b] are E matrices; one whose gradient is all
    zero is left alone. All else, and every group with `rank=None`, is stepped by AdamW.

    Args:
        params: parameters, pairs of name and parameter (`model.named_parameters()`), or groups
            of either. Names seed the random draws: give names if runs must be reproducible after
            the model's parameters changed in number. Without names they are `parameter_<n>`.
            Dtypes float32, bfloat16, float16; any device and strides. A tensor given twice, or
            two of the same address, shape and strides, is one parameter, with the settings of
            the first and the sum of the gradients.
        lr: learning rate; AdamW's values transfer.
        rank: dimensions of the random space. None is AdamW.
        betas: decay of the first and second moments a step.
        eps: added to the root of the second moment.
        weight_decay: decoupled; a step takes lr * weight_decay of the weights.
        warmup_steps: steps over which lr rises linearly from 0; counted from the group's
            `warmup_from`, which is 0.
        scale: alpha, the factor on the scaled gradient. None is sqrt(min(a, b) / rank), which
            makes updates as large as AdamW's. (apollo-torch's `scale` is alpha squared.)
        proj_refresh: steps between new random projections.
        norm_growth_limit: a matrix's scaled gradient may outgrow the last one by this factor;
            None switches the limiter off.
        variant: 'channel', a factor for each index of the larger side, or 'mini', one for the
            tensor. The paper's APOLLO-Mini is variant='mini' with rank=1.
        rounding: how bfloat16 and float16 weights are written. 'stochastic' keeps small updates
            on average; 'split16' keeps the lower 16 bits in the state, an exact float32 master
            (bfloat16 only); 'nearest' loses most updates near lr 1e-5.
        seed: of the projections and of stochastic rounding.
        impl: 'reference' is plain torch on any device; 'fused' is Triton on CUDA and compiled
            loops on a CPU, and refuses parameters that it cannot take (float16 on CUDA); 'auto'
            takes 'fused' for those that it can, but on a CPU only from 2^20 weights on.
        compat: 'apollo-torch' reproduces apollo-torch 1.0.3 with its faults. Pass eps=1e-6, its
            default; every parameter must then have a gradient at every step.
        regions: by name, which part of its parameter each tensor is, where `ranks` divide them.
        ranks: that step together, each with gradients of the same parameters.

    Group entries lr, weight_decay, warmup_steps, warmup_from, betas, eps, scale, proj_refresh,
    norm_growth_limit and those of a schedule ('schedule', 'final_lr_fraction', 'steps_total' from
    `warmup_from` on) may be rewritten between steps, and count from the next step on.

    What is exact: draws depend on (seed, parameter name, step, element number in row-major order)
    alone and have the same bits on every device. Matrix products and sums are as reproducible as
    torch's. Transposing a matrix that is not square transposes its update: exactly so for float32
    weights and for 'nearest' and 'split16'; under 'stochastic' the two round with different draws.

    Attributes:
        step_count: completed steps.
        weights: how many it steps; 'auto' goes by it on a CPU.
        before_write: called before parameters are written; what it raises ends the step, and
            nothing of it is written.
        before_param_write: called likewise with each parameter that will be written, weights and
            state.
        wrote: whether the step that was begun last has begun to write, weights or state.
        measure: set it to True to fill the next two at every step.
        last_update_norm: Euclidean norm of the stored change of the last step; float64, 0-dim.
        last_changed_fraction: part of all the stored elements whose bits changed in it; likewise.

    Raises:
        ValueError: an option is out of range, or a parameter cannot be stepped; it is named.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-5,
        rank: int | None = 64,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        warmup_steps: int = 0,
        scale: float | None = None,
        proj_refresh: int = 200,
        norm_growth_limit: float | None = 1.01,
        variant: Variant = "channel",
        rounding: RoundingMode = "stochastic",
        seed: int = 0,
        impl: Impl = "auto",
        compat: Compat | None = None,
        regions: Mapping[str, Region] = NO_REGIONS,
        ranks: Ranks = ALONE,
    ) -> None:
        check_choices(seed, variant=variant, rounding=rounding, impl=impl, compat=compat)
        defaults = {
            "lr": lr, "rank": rank, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "warmup_steps": warmup_steps, "warmup_from": 0, "scale": scale,
            "proj_refresh": proj_refresh, "norm_growth_limit": norm_growth_limit, **NO_SCHEDULE,
        }  # fmt: skip
        check_group(defaults)
        self.impl: Impl = impl
        self.measure = False
        self.before_write: Callable[[], None] = lambda: None
        self.before_param_write: Callable[[Tensor], None] = lambda _: None
        self.last_update_norm: Tensor | None = None
        self.last_changed_fraction: Tensor | None = None
        self._prepared: paths.PreparedStep | None = None
        self._steppers: dict[torch.device, FusedStepper] = {}
        super().__init__(
            params, defaults, seed=seed, variant=variant, rounding=rounding, compat=compat,
            regions=regions, ranks=ranks,
        )  # fmt: skip

    @overload
    def step(
        self, closure: None = None, gradients: Mapping[Tensor, Gradient] | None = None
    ) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(
        self,
        closure: Callable[[], float] | None = None,
        gradients: Mapping[Tensor, Gradient] | None = None,
    ) -> float | None:
        """Steps every parameter that has a gradient; returns what `closure` returned.

        Args:
            gradients: by parameter, or by a tensor tied to one, instead of each one's `grad`; those
                of matrices may be factors.

        Raises ValueError on an invalid group setting, and then changes nothing.
        """
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self.wrote = False
        self._step(gradients)
        return loss

    @torch.no_grad()
    def prepare(self, gradients: Mapping[Tensor, Gradient]) -> Tensor:
        """Sets aside what `step` needs for these gradients, and then allocates nothing itself.

        Returns the norm of them all, float64, 0-dim, not finite where one is not; nothing waits for
        a device. Holds the gradients until the next `step` or `forget`.
        """
        self._prepared = None
        prepared = self._prepare(gradients, self._settings())
        squares = [self._steppers[d].squares(each) for d, each in prepared.on_cuda.items()]
        for slot, grad, path in prepared.works:
            if path != "cuda" and slot.region.counted:
                squares.append(norm_of(grad).to(torch.float64).square())
        self._prepared = prepared
        squares = squares or [torch.zeros((), dtype=torch.float64)]
        total = torch.stack([each.to(squares[0].device) for each in squares]).sum()
        self.ranks.sum(total)
        return total.sqrt()

    def forget(self) -> None:
        """Lets go of what `prepare` holds."""
        self._prepared = None

    def _settings(self) -> list[StepSettings]:
        """Of the next step, by group."""
        number = self.step_count + 1
        return [settings_for(g, number, self.variant, self.compat) for g in self.param_groups]

    def _prepare(
        self, gradients: Mapping[Tensor, Gradient] | None, settings: list[StepSettings]
    ) -> paths.PreparedStep:
        found = [(slot, slot.gradient(gradients)) for slot in self._slots]
        chosen = self.impl, self.compat, self.weights
        works = [(slot, g, paths.path_of(slot, g, *chosen)) for slot, g in found if g is not None]
        on_cuda = dict[torch.device, list[Work]]()
        for slot, grad, path in works:
            if path == "cuda":
                work = Work(slot, grad, self.state[slot.param])
                on_cuda.setdefault(slot.param.device, []).append(work)
        kernels = {
            device: self._stepper(device).prepare(each, settings, self.rounding, self.measure)
            for device, each in on_cuda.items()
        }
        return paths.PreparedStep(gradients, works, kernels)

    def _take_prepared(
        self, gradients: Mapping[Tensor, Gradient] | None, settings: list[StepSettings]
    ) -> paths.PreparedStep:
        prepared, self._prepared = self._prepared, None
        if prepared is not None and gradients is not None and prepared.gradients is gradients:
            return prepared
        return self._prepare(gradients, settings)

    @torch.no_grad()
    def _step(self, gradients: Mapping[Tensor, Gradient] | None) -> None:
        """Writes what is prepared, or what is found now, and counts the step."""
        settings, change = self._settings(), Change() if self.measure else None
        prepared = self._take_prepared(gradients, settings)
        for device in prepared.on_cuda:
            self._stepper(device).begin(self.step_count + 1, settings)
        self.ranks.agree(lambda: self._announce(prepared))
        self.wrote = bool(prepared.works)
        self._write(prepared, settings, change)
        self._end(change)

    def _announce(self, prepared: paths.PreparedStep) -> None:
        if self._slots:
            self.before_write()
        for slot, _, _ in prepared.works:
            self.before_param_write(slot.param)

    def _write(
        self, prepared: paths.PreparedStep, settings: list[StepSettings], change: Change | None
    ) -> None:
        jobs: dict[paths.Path, list[Job]] = {"cpu": [], "reference": []}
        for slot, grad, path in prepared.works:
            if path != "cuda":
                counted = change if slot.region.counted else None
                jobs[path].append(self._job(slot, grad, settings, counted))
        for skipped in step_parameters(jobs["reference"], self.ranks):
            self._count_skipped(skipped)
        if jobs["cpu"]:
            self._count_skipped(torch.stack(cpu.step_parameters(jobs["cpu"])).sum())
        for device, each in prepared.on_cuda.items():
            skipped, changed = self._stepper(device).step(each)
            if device.type == "cuda":
                # What a rank that ended left out is noticed here, and not taken for a step.
                self.ranks.meet(device)
            self._count_skipped(skipped)
            if change is not None and changed is not None:
                change.add_sums(*changed.unbind())

    def _end(self, change: Change | None) -> None:
        self.last_update_norm = self.last_changed_fraction = None
        if change is not None:
            self.last_update_norm, changed = change.totals(self.ranks)
            self.last_changed_fraction = changed / max(1, self.weights)
        self.step_count += 1

    def slowness(self) -> str:
        """Why steps are slow, in a sentence; empty where they are not."""
        return paths.slowness(self._slots, self.impl, self.compat, self.weights)

    def compiled_kinds(self) -> set[paths.Kind]:
        """What has to be compiled before its parameters can be stepped."""
        return paths.compiled_kinds(self._slots, self.impl, self.compat, self.weights)

    def adopt(self, meta: Mapping[str, Any]) -> None:
        """Takes over counters, seed and group settings of metadata that was checked."""
        super().adopt(meta)
        # Their tables hold keys of the old seed.
        self._steppers.clear()

    def _job(
        self, slot: Slot, grad: Gradient, settings: list[StepSettings], change: Change | None
    ) -> Job:
        own = settings[slot.group]
        rounding = Rounding(self.rounding, slot.rounding_key, own.number, slot.lines)
        return Job(slot, grad, self.state[slot.param], own, rounding, change)

    def _stepper(self, device: torch.device) -> FusedStepper:
        if device not in self._steppers:
            self._steppers[device] = FusedStepper(device, self.variant == "mini", self.ranks)
        return self._steppers[device]
