"""How flash-linear-attention's kernels of the gated delta rule are cut, without trying it out.

Left alone, each kernel is compiled in every way that its authors thought of, and timed, for each
number of heads, and some for each length of a batch: minutes at the first start, seconds amid a
run. The library reads one way for each kernel from a folder (fla/ops/utils/cache.py, 0.6).
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

_MODE, _FOLDER = "FLA_CACHE_MODE", "FLA_CONFIG_DIR"
# Of each kernel: its tiles, warps, stages.
_WAYS: dict[str, tuple[dict[str, int], int, int]] = {
    "l2norm_fwd_kernel": ({"BT": 16}, 4, 2),
    "l2norm_bwd_kernel": ({"BT": 16}, 4, 2),
    "chunk_local_cumsum_scalar_kernel": ({}, 4, 2),
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel": ({"BK": 64}, 2, 2),
    "recompute_w_u_fwd_kernel": ({}, 4, 2),
    # A chunk waits for the one before it: small tiles, so that all of the card is at work.
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_fwd_kernel_o": ({"BK": 64, "BV": 64}, 4, 2),
    "prepare_wy_repr_bwd_kernel": ({}, 4, 2),
    "chunk_bwd_kernel_dv_local": ({}, 4, 2),
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64": ({"BV": 32}, 4, 2),
    "chunk_bwd_kernel_dqkwg": ({}, 4, 2),
}


def settle(folder: Path) -> None:
    """Has the library read its ways from there, where it is installed and no user chose others.

    Args:
        folder: made where it is missing; files in it are replaced.

    Call it before the library is imported. Raises OSError.
    """
    if find_spec("fla") is None or _MODE in os.environ or _FOLDER in os.environ:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name, (tiles, warps, stages) in _WAYS.items():
        way = {"kwargs": tiles, "num_warps": warps, "num_stages": stages, "num_ctas": 1}
        (folder / f"{name}.json").write_text(json.dumps({"default_config": way}))
    os.environ |= {_MODE: "default", _FOLDER: str(folder)}
