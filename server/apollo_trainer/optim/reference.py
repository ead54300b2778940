"""One step of one parameter in plain torch, beside Algorithm 1 of arXiv 2412.05270.

Symbols as in the paper: W the weight, G its gradient, P the projection [r, m], R = P G [r, n] with
n the larger side, M and V the moments of R, s the scaling factors. Every matrix is taken as a
stack [B, a, b] with B = 1. Nothing here waits for the device: what is skipped is masked.

The arithmetic sees a gradient through contiguous float32 tiles, larger side first. Its bits
therefore depend on the values alone, not on strides; and transposing a matrix that is not square
transposes its exact update.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from apollo_trainer.optim.change import Change
from apollo_trainer.optim.factored import Factored, Factors, Gradient, Projection
from apollo_trainer.optim.options import StepSettings
from apollo_trainer.optim.parameters import Slot
from apollo_trainer.optim.projection import draw_apollo_torch_projection, draw_projection
from apollo_trainer.optim.rounding import Rounding

# The limiter never caps |G diag(s)| below this times sqrt(numel): after a near-zero gradient a
# growth of 1 % a step would otherwise hold the matrix still for hundreds of steps.
NORM_FLOOR = 1e-3
_TILE_CPU = 2**20
_TILE_DEVICE = 2**24
# A step of one parameter: what it gives is replaced by its sum over ranks; then whether the
# gradient was not finite.
Steps = Generator[list[Tensor], None, Tensor]


@dataclass(frozen=True)
class Job:
    """One parameter in one step.

    `grad` has the parameter's shape, any float dtype and strides; factors are of matrices alone.
    """

    slot: Slot
    grad: Gradient
    state: dict[str, Tensor]
    settings: StepSettings
    rounding: Rounding
    change: Change | None

    @property
    def uncorrected(self) -> bool:
        """True where apollo-torch is reproduced: it corrects the bias in the step size only."""
        return self.settings.compat == "apollo-torch"


def step_parameter(job: Job) -> Tensor:
    """Steps one parameter in place. Returns a bool (0-dim): the gradient was not finite.

    A gradient is not finite where it holds NaN or infinity, or where its norm overflows float32;
    its matrix, moments and step count then stay as they are.
    """
    steps = begin(job)
    try:
        while True:
            next(steps)
    except StopIteration as end:
        return end.value  # type: ignore[no-any-return]


def begin(job: Job) -> Steps:
    """The step of one parameter, which waits wherever the sums of other ranks are needed."""
    return _step_matrices(job) if job.slot.rank is not None else _step_elements(job)


def _step_matrices(job: Job) -> Steps:
    """Algorithm 1 for a matrix [a, b], or for each matrix of a stack [E, a, b]."""
    G, slot = _factors_or_stack(job.grad), job.slot
    R, G_norms = _project(G, _projection(job), slot.rank or 0, slot.tall, job.grad.shape)
    if slot.cut == -3 - slot.large:
        G_norms.square_()
        yield [R, G_norms]
        G_norms.sqrt_()
    m, v = _next_moments(job.settings, job.state["m"], job.state["v"], R)
    step = job.state["step"].view(-1) + 1
    scaled, plain = _channel_norms(job, m, v, step, R)
    if slot.cut == slot.large and job.settings.variant == "mini":
        scaled, plain = scaled.square(), plain.square()
        yield [scaled, plain]
        scaled, plain = scaled.sqrt(), plain.sqrt()
    s = scaled / (plain + 1e-8) if job.uncorrected else torch.where(plain == 0, 0.0, scaled / plain)
    X_norm: Tensor = torch.linalg.vector_norm(s * G_norms, dim=-1)
    reached = (G_norms > 0).any(-1)
    if slot.cut == slot.large:
        X_norm, some = X_norm.square(), reached.to(torch.float32)
        yield [X_norm, some]
        X_norm, reached = X_norm.sqrt(), some > 0
    finite = X_norm.isfinite()
    # An expert that no token reached has no gradient at all: it keeps its weights and moments.
    active = finite & reached if job.grad.ndim == 3 else finite
    factor, norm = limit(job, X_norm, step)
    state = job.state
    for key, new in (("m", m), ("v", v), ("step", step), ("norm", norm)):
        old = state[key].view(new.shape)
        torch.where(_like(active, new), new, old, out=old)
    _write_matrices(job, G, s * (factor * rate(job, step)).unsqueeze(-1), active)
    return finite.all().logical_not()


def _projection(job: Job) -> Tensor:
    slot, window, device = job.slot, job.settings.window, job.grad.device
    width, rank, small = min(slot.root[-2:]), slot.rank or 0, -3 - slot.large
    if job.settings.compat == "apollo-torch":
        return draw_apollo_torch_projection(slot.index, window, rank, width, slot.tall, device)
    P = draw_projection(slot.projection_key, window, rank, width, device)
    if slot.region.is_whole(small):
        return P
    return P[:, torch.tensor(slot.region.indices(small), device=device)]


def _project(
    G: Tensor | list[Factors], P: Tensor, rank: int, tall: bool, shape: torch.Size
) -> tuple[Tensor, Tensor]:
    """Returns R = P G [B, r, n] and the channel norms |G_j| [B, n], reading G [B, a, b] once.

    All the matrices of a stack share P: the paper's argument is about one matrix at a time.
    """
    n, m = shape[-2:] if tall else shape[-2:][::-1]
    R = torch.empty((len(G), rank, n), dtype=torch.float32, device=P.device)
    norms = torch.empty((len(G), n), dtype=torch.float32, device=P.device)
    if isinstance(G, list):
        for b, factors in enumerate(G):
            Projection(factors, P, tall).project(slice(0, n), R[b], norms[b])
        return R, norms
    large = G if tall else G.mT
    for b in range(len(G)):
        for rows in row_tiles(n, m, P.device):
            tile = large[b, rows].to(torch.float32, memory_format=torch.contiguous_format)
            tile = tile.contiguous()
            R[b, :, rows] = P @ tile.mT
            torch.linalg.vector_norm(tile, dim=1, out=norms[b, rows])
    return R, norms


def _next_moments(s: StepSettings, m: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Both moments with `grad` taken in, as new tensors of its shape."""
    beta1, beta2 = s.betas
    new_m = (m.view(grad.shape) * beta1).add_(grad, alpha=1.0 - beta1)
    new_v = (v.view(grad.shape) * beta2).addcmul_(grad, grad, value=1.0 - beta2)
    return new_m, new_v


def _direction(job: Job, m: Tensor, v: Tensor, step: Tensor) -> Tensor:
    """R~ = M^ / (sqrt(V^) + eps), of the shape of m; without the corrections in compat."""
    if job.uncorrected:
        return m / v.sqrt().add_(job.settings.eps)
    correction1, correction2 = bias_corrections(job, step)
    denominator = (v / _like(correction2, v)).sqrt_().add_(job.settings.eps)
    return (m / _like(correction1, m)).div_(denominator)


def bias_corrections(job: Job, step: Tensor) -> tuple[Tensor, Tensor]:
    """1 - beta ** step of both moments, float32 of the shape of `step`."""
    t = step.to(torch.float64)
    first, second = (1.0 - torch.pow(beta, t) for beta in job.settings.betas)
    return first.to(torch.float32), second.to(torch.float32)


def _channel_norms(
    job: Job, m: Tensor, v: Tensor, step: Tensor, R: Tensor
) -> tuple[Tensor, Tensor]:
    """|R~| and |R|, [B, n] for variant 'channel' and [B, 1] for 'mini'; s is their quotient."""
    dim = (-2,) if job.settings.variant == "channel" else (-2, -1)
    scaled: Tensor = torch.linalg.vector_norm(_direction(job, m, v, step), dim=dim)
    plain: Tensor = torch.linalg.vector_norm(R, dim=dim)
    if job.settings.variant == "mini":
        return scaled.unsqueeze(-1), plain.unsqueeze(-1)
    return scaled, plain


def limit(job: Job, X_norm: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the limiter's factor on G diag(s) and the norm to remember, both [B].

    A step of norm zero leaves the remembered norm alone.
    """
    growth, previous = job.settings.norm_growth_limit, job.state["norm"].view(-1)
    if growth is None:
        factor = torch.ones_like(X_norm)
    elif job.uncorrected:
        over = (X_norm / (previous + 1e-8)).clamp_(min=growth) / growth
        factor = torch.where(step > 1, 1.0 / over, 1.0)
        return factor, X_norm * factor
    else:
        cap = (previous * growth).clamp_(min=NORM_FLOOR * math.sqrt(math.prod(job.slot.root[-2:])))
        factor = torch.where(previous > 0, (cap / X_norm).clamp_(max=1.0), 1.0)
    return factor, torch.where(X_norm > 0, X_norm * factor, previous)


def rate(job: Job, step: Tensor) -> Tensor:
    """lr * alpha [B]; in compat with the bias corrections that the direction left out."""
    s, rank = job.settings, job.slot.rank
    lr = s.lr * s.alpha(min(job.slot.root[-2:]), rank) if rank is not None else s.lr
    if not job.uncorrected:
        return torch.full(step.shape, lr, dtype=torch.float32, device=step.device)
    first, second = bias_corrections(job, step)
    return second.sqrt().div(first).mul(lr)


def _write_matrices(job: Job, G: Tensor | list[Factors], factors: Tensor, active: Tensor) -> None:
    """Writes W - lr alpha G diag(s) - lr lambda W. `factors` [B, n or 1] hold lr alpha s."""
    W, low = _as_stack(job.slot.param), job.state.get("low")
    count, a, b = W.shape
    along_rows = job.settings.variant == "channel" and job.slot.tall
    for e in range(count):
        for rows in row_tiles(a, b, W.device):
            f = factors[e, rows].unsqueeze(-1) if along_rows else factors[e]
            update = _rows(G[e], rows) * f
            half = _as_stack(low)[e, rows] if low is not None else None
            first = (e * a + rows.start) * b
            _write_tile(job, W[e, rows], half, update, active[e], first)


def _step_elements(job: Job) -> Steps:
    """Adam with decoupled decay (AdamW), for every parameter that is not projected."""
    assert isinstance(job.grad, Tensor)
    W, G, m, v = (_as_rows(t) for t in (job.slot.param, job.grad, job.state["m"], job.state["v"]))
    low = _as_rows(job.state["low"]) if "low" in job.state else None
    norm: Tensor = torch.linalg.vector_norm(G, dtype=torch.float32)
    if job.slot.cut is not None:
        norm = norm.to(torch.float64).square()
        yield [norm]
        norm = norm.sqrt().to(torch.float32)
    finite = norm.isfinite()
    step = job.state["step"] + 1
    lr, width = rate(job, step), math.prod(G.shape[1:])
    for rows in row_tiles(len(G), width, G.device):
        moments = _next_moments(job.settings, m[rows], v[rows], G[rows].to(torch.float32))
        update = _direction(job, *moments, step).mul_(lr)
        for old, new in zip((m[rows], v[rows]), moments, strict=True):
            torch.where(finite, new, old, out=old)
        half = low[rows] if low is not None else None
        _write_tile(job, W[rows], half, update, finite, rows.start * width)
    job.state["step"].add_(finite)
    return finite.logical_not()


def _write_tile(
    job: Job, stored: Tensor, low: Tensor | None, update: Tensor, active: Tensor, first: int
) -> None:
    """Subtracts `update` (float32) and the decay from a tile of weights, and stores it rounded."""
    s = job.settings
    W = job.rounding.read(stored, low)
    decay = 1.0 - s.lr * s.weight_decay
    # apollo-torch decays after the update.
    new = (W - update).mul_(decay) if job.uncorrected else (W * decay).sub_(update)
    # A weight that was stored is rounded to itself, in every mode.
    new = torch.where(active, new, W)
    rounded, new_low = job.rounding.round(new, stored.dtype, first)
    if job.change is not None:
        job.change.add(stored, rounded)
    stored.copy_(rounded)
    if low is not None and new_low is not None:
        low.copy_(new_low)


def row_tiles(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of dimension 0 that bound the temporaries; on a CPU they stay in its caches."""
    elements = _TILE_CPU if device.type == "cpu" else _TILE_DEVICE
    size = max(1, elements // max(1, width))
    for start in range(0, rows, size):
        yield slice(start, min(rows, start + size))


def _rows(matrix: Tensor | Factors, rows: slice) -> Tensor:
    """Some rows of a gradient, float32."""
    if isinstance(matrix, Tensor):
        return matrix[rows].to(torch.float32)
    left, right = matrix
    return left[:, rows].mT @ right


def _factors_or_stack(grad: Gradient) -> Tensor | list[Factors]:
    return list(grad.matrices()) if isinstance(grad, Factored) else _as_stack(grad)


def _as_stack(t: Tensor) -> Tensor:
    return t.unsqueeze(0) if t.ndim == 2 else t


def _as_rows(t: Tensor) -> Tensor:
    return t.unsqueeze(0) if t.ndim == 0 else t


def _like(per_matrix: Tensor, t: Tensor) -> Tensor:
    """Appends dimensions, so that one value per matrix broadcasts over `t`."""
    return per_matrix.view(per_matrix.shape + (1,) * (t.ndim - per_matrix.ndim))
