"""The seeded weights and gradients behind the stored vectors, made anew instead of stored."""

import numpy as np

SHAPES = {
    "tall": (48, 16),
    "wide": (16, 48),
    "square": (24, 24),
    "stalled": (32, 12),
    "bias": (40,),
}
STEPS = 100
CHECKPOINTS = (1, 20, 21, 40, 60, 100)
SPIKES = {30: 100.0, 31: 0.01, 75: 1000.0}
ZERO_STEP = 50

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-6, "weight_decay": 0.1}
REFRESH = 20
# scale_type of apollo-torch, rank, and its scale, which is the square of alpha.
CASES = {"channel": ("channel", 8, 1.0), "mini": ("tensor", 1, 4.0)}


def _normal(name: str, step: int) -> np.ndarray:
    # RandomState's stream is frozen; that of numpy's newer generators may change.
    random = np.random.RandomState(1000 * list(SHAPES).index(name) + step)
    return random.standard_normal(SHAPES[name])


def weight(name: str) -> np.ndarray:
    """The weights before the first step, float32."""
    return (0.02 * _normal(name, 0)).astype(np.float32)


def gradient(name: str, step: int) -> np.ndarray:
    """The gradient of step 1, 2, ..., float32: a steady part, noise, and some spikes.

    "stalled" has one gradient of zero, after which apollo-torch hardly moves it again.
    """
    size = SPIKES.get(step, 1.0)
    if name == "stalled" and step == ZERO_STEP:
        size = 0.0
    steady = _normal(name, 999)
    return (size * 1e-2 * (0.5 * steady + _normal(name, step))).astype(np.float32)
