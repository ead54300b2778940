"""Steps as the script took them that the product replaces: plain transformers with apollo-torch.

The context runs once without gradient, the rest over it; all gradients are kept.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # contenders is a script's
import contenders

Sample = dict[str, list[int]]


def plain(model: Path, cases: dict[str, Sample]) -> dict[str, Any]:
    """Times and memory of the steps of one sample each; or why there are none."""
    try:
        contender = contenders.apollo_torch(rank=64)
    except contenders.Unavailable as missing:
        return {"unavailable": str(missing)}
    served = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).cuda().eval()
    torch.cuda.reset_peak_memory_stats()
    optimizer, before = (
        contender.make(dict(served.named_parameters())),
        torch.cuda.memory_allocated(),
    )
    rows = {}
    for case, sample in cases.items():
        rows[case] = timed(lambda sample=sample: plain_step(served, optimizer, sample))
        peak = torch.cuda.max_memory_allocated() - before
        rows[case]["gb_beyond_weights"] = peak / 1e9
        print("plain", case, rows[case], flush=True)
    return rows


def plain_step(model: Any, optimizer: Any, sample: Sample) -> None:
    """One context-frozen step with all gradients."""
    context, continuation = sample["context_ids"], sample["continuation_ids"]
    ids = torch.tensor([context[:-1]], device="cuda")
    with torch.no_grad():
        cache = model(ids, use_cache=True, logits_to_keep=1).past_key_values
    inputs = torch.tensor([[context[-1], *continuation[:-1]]], device="cuda")
    logits = model(inputs, past_key_values=cache, use_cache=True).logits[0]
    targets = torch.tensor(continuation, device="cuda")
    torch.nn.functional.cross_entropy(logits.float(), targets).backward()
    optimizer.step()
    optimizer.zero_grad()


def timed(step: Callable[[], None]) -> dict[str, float]:
    """Milliseconds of a step by the clock, the device waited for."""
    times = []
    for number in range(10):
        began = time.perf_counter()
        step()
        torch.cuda.synchronize()
        if number >= 3:
            times.append(1e3 * (time.perf_counter() - began))
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
