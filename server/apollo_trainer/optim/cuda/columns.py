"""Columns of the tables that the kernels read; `tables.py` fills them in this order."""

# mypy: ignore-errors
from __future__ import annotations

import triton.language as tl

# Columns of `desc`: what stays from step to step.
W_PTR = tl.constexpr(0)
M_PTR = tl.constexpr(1)
V_PTR = tl.constexpr(2)
LOW_PTR = tl.constexpr(3)
NORM_PTR = tl.constexpr(4)
STEP_PTR = tl.constexpr(5)
ROWS = tl.constexpr(6)
COLS = tl.constexpr(7)
W_ROW = tl.constexpr(8)
W_COL = tl.constexpr(9)
FIRST = tl.constexpr(10)  # number of its first element within the parameter
P_KEY = tl.constexpr(11)
ROUND_KEY = tl.constexpr(13)
P_OFFSET = tl.constexpr(15)
R_OFFSET = tl.constexpr(16)
S_OFFSET = tl.constexpr(17)
PART_OFFSET = tl.constexpr(18)
PARTS = tl.constexpr(19)
SLOT = tl.constexpr(20)
STACKED = tl.constexpr(21)
GROUP = tl.constexpr(22)
ALPHA = tl.constexpr(23)  # the bits of a float64
# Where the whole matrix has the rows or columns of a part: each is so many further on, those
# before CUT_AT by the first number, and the others by the second.
CUT_AT = tl.constexpr(24)
FIRST_SHIFT = tl.constexpr(25)
SECOND_SHIFT = tl.constexpr(26)
ROOT_ROWS = tl.constexpr(27)
ROOT_COLS = tl.constexpr(28)
INDEX = tl.constexpr(29)  # within a stack
# What changes with every gradient. Of factors, G_PTR and G_ROW tell of the left one.
G_PTR = tl.constexpr(30)
G_ROW = tl.constexpr(31)
G_COL = tl.constexpr(32)
RIGHT_PTR = tl.constexpr(33)
RIGHT_ROW = tl.constexpr(34)
TOKENS = tl.constexpr(35)  # of a matrix, or of all the experts of a stack
ENDS_PTR = tl.constexpr(36)  # 0 for a matrix
C_WIDTH = tl.constexpr(37)
C_OFFSET = tl.constexpr(38)
FIELDS = tl.constexpr(39)

# Which of a matrix is a part of it.
CUT_NONE, CUT_ROWS, CUT_COLS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Columns of `settings` (float64), a row a parameter group.
LR = tl.constexpr(0)
BETA1 = tl.constexpr(1)
BETA2 = tl.constexpr(2)
EPS = tl.constexpr(3)
DECAY = tl.constexpr(4)
GROWTH = tl.constexpr(5)  # 0: no limiter
REFRESH = tl.constexpr(6)
SETTINGS = tl.constexpr(8)
