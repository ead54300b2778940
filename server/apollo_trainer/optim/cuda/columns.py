"""Columns of the tables that the kernels read; `tables.py` fills them in this order."""

# mypy: ignore-errors
from __future__ import annotations

import triton.language as tl

# Columns of `desc`.
W_PTR = tl.constexpr(0)
G_PTR = tl.constexpr(1)
M_PTR = tl.constexpr(2)
V_PTR = tl.constexpr(3)
LOW_PTR = tl.constexpr(4)
NORM_PTR = tl.constexpr(5)
STEP_PTR = tl.constexpr(6)
ROWS = tl.constexpr(7)
COLS = tl.constexpr(8)
W_ROW = tl.constexpr(9)
W_COL = tl.constexpr(10)
G_ROW = tl.constexpr(11)
G_COL = tl.constexpr(12)
FIRST = tl.constexpr(13)  # number of its first element within the parameter
P_KEY = tl.constexpr(14)
ROUND_KEY = tl.constexpr(16)
P_OFFSET = tl.constexpr(18)
R_OFFSET = tl.constexpr(19)
S_OFFSET = tl.constexpr(20)
PART_OFFSET = tl.constexpr(21)
PARTS = tl.constexpr(22)
SLOT = tl.constexpr(23)
STACKED = tl.constexpr(24)
GROUP = tl.constexpr(25)
ALPHA = tl.constexpr(26)  # the bits of a float64
FIELDS = tl.constexpr(27)

# Columns of `settings` (float64), a row a parameter group.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
GROWTH = tl.constexpr(5)  # 0: no limiter
REFRESH = tl.constexpr(6)
SETTINGS = tl.constexpr(8)
