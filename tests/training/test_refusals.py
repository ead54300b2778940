"""Whatever refuses a step changes no byte of weights, state or generators, and is forgotten."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from apollo_grpc.errors import Cancelled, FailedPrecondition
from apollo_trainer.optim import Apollo
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.delta_rule import choose_delta_rule
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.guard import Guard, UpdateRefused
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import StepPolicy, StepResult, take_step

Make = Callable[[str], Any]
SAMPLES = [
    TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30)),
    TokenizedSample((11, 12), (13, 14), 2.0),
]
AT_ONCE = StepPolicy()
IN_MICRO_BATCHES = StepPolicy(token_budget=4)
POLICIES = [AT_ONCE, IN_MICRO_BATCHES]


@dataclass(frozen=True)
class Case:
    """How a model is stepped; Qwen3 with its head tied to its embedding, the experts' apart."""

    family: str
    dtype: torch.dtype
    impl: Any
    device: str = "cpu"
    captured: bool = False

    def __str__(self) -> str:
        passes = "captured" if self.captured else "as they are"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.family} {dtype} {self.impl} {self.device} {passes}"


NEEDS_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
KINDS = list(itertools.product(("qwen3", "qwen3_moe"), (torch.float32, torch.bfloat16)))
ON_CPU = [
    Case("qwen3", torch.float32, "reference"),
    Case("qwen3", torch.bfloat16, "fused"),
    Case("qwen3_moe", torch.float32, "fused"),
    Case("qwen3_moe", torch.bfloat16, "reference"),
]
ON_CUDA = [Case(*kind, "fused", "cuda", captured) for kind in KINDS for captured in (False, True)]
CASES = [
    *(pytest.param(case, id=str(case)) for case in ON_CPU),
    *(pytest.param(case, id=str(case), marks=NEEDS_CUDA) for case in ON_CUDA),
]


class Trained:
    """A model with its optimizer and its graphs, which can be put back to where it was kept."""

    def __init__(self, model: Any, case: Case):
        self.model, self.case = model.to(case.device, case.dtype), case
        if model.config.tie_word_embeddings:
            # As the live model has them: two tensors over one memory.
            tied = model.get_input_embeddings().weight.detach()
            model.lm_head.weight = torch.nn.Parameter(tied)
        if case.captured:
            choose_delta_rule(model)
            speed_up(model)
        self.passes = CapturedPasses(model) if case.captured else None
        self.optimizer = Apollo(
            model.named_parameters(), lr=1e-3, rank=8, seed=5, impl=case.impl, warmup_steps=50
        )
        self.optimizer.measure = True

    def step(
        self,
        policy: StepPolicy = AT_ONCE,
        samples: list[TokenizedSample] = SAMPLES,
        before_batch: Callable[[], None] = lambda: None,
    ) -> StepResult:
        # By itself torch takes cuDNN's attention on a GPU, whose backward pass differs by the run.
        own = self.case.captured or self.case.device == "cpu"
        with nullcontext() if own else sdpa_kernel(SDPBackend.MATH):
            return take_step(self.model, self.optimizer, samples, policy, before_batch, self.passes)

    def keep(self) -> None:
        tensors, meta = self.optimizer.named_state()
        self._kept = (
            [p.detach().clone() for p in self.model.parameters()],
            {name: tensor.clone() for name, tensor in tensors.items()},
            meta,
        )

    def put_back(self) -> None:
        values, tensors, meta = self._kept
        with torch.no_grad():
            for parameter, value in zip(self.model.parameters(), values, strict=True):
                parameter.copy_(value)
        self.optimizer.load_named_state(tensors, meta)

    def digest(self) -> str:
        """Of every weight, and of all that `named_state` gives, step counts included."""
        tensors, meta = self.optimizer.named_state()
        found = hashlib.sha256(json.dumps(meta, sort_keys=True).encode())
        for tensor in (*self.model.parameters(), *tensors.values()):
            found.update(_bytes_of(tensor))
        return found.hexdigest()

    def everything(self) -> tuple[str, bytes]:
        """The digest, and the generators of the CPU and of the device."""
        generators = [torch.get_rng_state()]
        if self.case.device == "cuda":
            generators.append(torch.cuda.get_rng_state())
        return self.digest(), b"".join(map(_bytes_of, generators))


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).cpu().numpy().tobytes()


Pair = tuple[Trained, Trained]


def twins(make: Callable[[], Any], case: Case) -> Pair:
    """Two that took the same steps; where they differ at all, no later test could tell."""
    pair = Trained(make(), case), Trained(make(), case)
    for trained in pair:
        for policy in 3 * POLICIES:
            trained.step(policy)
        trained.keep()
    assert pair[0].digest() == pair[1].digest(), "these steps are not the same when repeated"
    if case.captured and case.family == "qwen3":
        for passes in (trained.passes for trained in pair):
            assert passes is not None and len(passes) == 2, passes and passes.refusal
    return pair


def step_alike(pair: Pair, policy: StepPolicy = AT_ONCE) -> None:
    """The next step of both is the same, in what it tells and in every byte."""
    told = [trained.step(policy) for trained in pair]
    for name in ("loss_sum", "grad_norm", "update_norm", "changed_fraction", "learning_rate"):
        assert getattr(told[0], name) == getattr(told[1], name), name
    assert told[0].optimizer_step == told[1].optimizer_step == 7
    assert pair[0].digest() == pair[1].digest()


@pytest.fixture(scope="module", params=CASES)
def built(request: pytest.FixtureRequest, make_model: Make) -> Pair:
    case = request.param
    return twins(lambda: make_model(case.family), case)


@pytest.fixture
def pair(built: Pair) -> Iterator[Pair]:
    """The first is refused; the second never saw a refusal."""
    for trained in built:
        trained.put_back()
    assert built[0].digest() == built[1].digest()
    yield built
    for trained in built:
        trained.optimizer.before_write = lambda: None
        trained.optimizer.before_param_write = lambda _: None


@pytest.mark.parametrize("policy", POLICIES, ids=["at once", "in micro-batches"])
@pytest.mark.parametrize(
    "guard", [Guard(max_loss=1e-9), Guard(max_grad_norm=1e-9), Guard(max_update_ratio=1e-12)]
)
def test_a_guard_that_fires(pair: Pair, guard: Guard, policy: StepPolicy) -> None:
    trained, before = pair[0], pair[0].everything()
    (name,) = (name for name, limit in vars(guard).items() if limit)
    for dry_run in (False, True):
        with pytest.raises(UpdateRefused, match="This update was not written") as caught:
            trained.step(StepPolicy(policy.token_budget, guard, dry_run))
        assert caught.value.reason == f"GUARD_{name.upper()}"
        assert trained.everything() == before
    step_alike(pair, policy)


@pytest.mark.parametrize("policy", POLICIES, ids=["at once", "in micro-batches"])
def test_a_dry_run_tells_what_the_step_then_does(pair: Pair, policy: StepPolicy) -> None:
    trained, before = pair[0], pair[0].everything()
    dry = trained.step(StepPolicy(policy.token_budget, dry_run=True))
    assert trained.everything() == before
    assert dry.optimizer_step == 6
    taken = pair[1].step(policy)
    assert (dry.loss_sum, dry.grad_norm) == (taken.loss_sum, taken.grad_norm)
    assert dry.learning_rate == taken.learning_rate
    # The same numbers, summed parameter by parameter.
    assert dry.update_norm == pytest.approx(taken.update_norm, rel=1e-9)
    assert dry.changed_fraction == pytest.approx(taken.changed_fraction, rel=1e-9)
    pair[1].put_back()
    step_alike(pair, policy)


ERRORS = {
    "a lost lease": FailedPrecondition("vLLM went on", reason="PAUSE_LOST"),
    "a cancelled run": Cancelled("enough"),
    "a full disk": OSError(28, "No space left on device"),
    "control-C": KeyboardInterrupt(),
}
# Which of its calls in a step raises; they are counted from the last where negative.
PLACES = [
    ("before_batch", 1),
    ("before_batch", 2),
    ("before_write", 1),
    ("before_param_write", 1),
    ("before_param_write", 9),
    ("before_param_write", -1),
]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"{place[0]} {place[1]}")
def test_what_is_raised_before_the_write(pair: Pair, place: tuple[str, int]) -> None:
    trained, before, (hook, at) = pair[0], pair[0].everything(), place
    at = at if at > 0 else len(trained.optimizer.state)
    for error in ERRORS.values():
        calls = itertools.count(1)

        def fail(*_: Any, error: BaseException = error, calls: Iterator[int] = calls) -> None:
            if next(calls) == at:
                raise error

        before_batch = fail if hook == "before_batch" else lambda: None
        if hook != "before_batch":
            setattr(trained.optimizer, hook, fail)
        with pytest.raises(type(error)) as caught:
            trained.step(IN_MICRO_BATCHES, before_batch=before_batch)
        assert caught.value is error
        assert next(calls) == at + 1, "the step went on after it was forbidden"
        assert trained.everything() == before
    trained.optimizer.before_write = lambda: None
    trained.optimizer.before_param_write = lambda _: None
    step_alike(pair, IN_MICRO_BATCHES)


PLANTED: dict[str, tuple[Callable[[Any], Tensor], float]] = {
    "a NaN in the head": (lambda m: m.lm_head.weight[-1, -1:], torch.nan),
    "a NaN in the last layer": (lambda m: m.model.layers[-1].self_attn.o_proj.weight[0], torch.nan),
    "an infinity in the last norm": (lambda m: m.model.norm.weight[5:6], torch.inf),
    "an infinity in the first norm": (
        lambda m: m.model.layers[0].input_layernorm.weight[3:4],
        -torch.inf,
    ),
}


@pytest.mark.parametrize("planted", PLANTED.values(), ids=PLANTED)
def test_weights_that_are_not_finite(
    pair: Pair, planted: tuple[Callable[[Any], Tensor], float]
) -> None:
    trained, (find, value) = pair[0], planted
    where = find(trained.model).detach()
    kept = where.clone()
    where.fill_(value)
    before = trained.everything()
    for policy in (AT_ONCE, StepPolicy(4, Guard(max_update_ratio=1.0)), StepPolicy(dry_run=True)):
        with pytest.raises(UpdateRefused, match="is not finite; this update was not written") as it:
            trained.step(policy)
        assert it.value.reason in ("NONFINITE_LOSS", "NONFINITE_GRADIENT")
        assert trained.everything() == before
    where.copy_(kept)
    step_alike(pair)


@pytest.mark.parametrize("weight", [torch.nan, torch.inf])
def test_loss_weights_that_are_not_finite(pair: Pair, weight: float) -> None:
    """The loss that is told has no weights in it: the gradient alone says so."""
    trained, before = pair[0], pair[0].everything()
    heavy = TokenizedSample((3, 50, 7, 99), (140, 2, 77, 30), 1.0, (1.0, 1.0, 1.0, weight))
    with pytest.raises(UpdateRefused) as caught:
        trained.step(samples=[heavy, SAMPLES[1]])
    assert caught.value.reason == "NONFINITE_GRADIENT"
    assert trained.everything() == before
    step_alike(pair)
