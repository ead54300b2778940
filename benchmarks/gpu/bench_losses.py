"""Losses of 50 steps with all that makes steps fast, without it, and by autograd alone.

    python -m benchmarks.gpu.bench_losses

Models of some 40 million random weights learn the same few samples in bfloat16, from the same
weights. *fast* is what the server runs on a GPU: fused norms and rotary positions, grouped
attention, passes in CUDA graphs (none on a CPU), gradients as factors. *plain* is the same step
without all of it but the factors, and *autograd* is transformers with whole gradients in `.grad`,
given to the same optimizer. How far rounding alone drives losses apart is seen by plain steps with
other seeds of projections and rounding. Writes a JSON file and draws its picture.
"""

from __future__ import annotations

import argparse
import copy
import json
import random
import time
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, Qwen3Config, Qwen3MoeConfig

from apollo_trainer.optim import Apollo
from apollo_trainer.training.captured import CapturedPasses
from apollo_trainer.training.faster import speed_up
from apollo_trainer.training.samples import TokenizedSample
from apollo_trainer.training.step import take_step
from benchmarks import machine
from benchmarks.gpu.losses_chart import picture

VOCABULARY, HIDDEN, LAYERS = 32_000, 512, 6
PERIOD, CONTEXT, LEARNED, SAMPLES = 8, 40, 24, 8
RATE, STEPS = 1e-4, 50
PICTURE = machine.ROOT / "docs" / "quality-losses.svg"
_SHARED: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": None, "eos_token_id": 0}
_QWEN3: dict[str, Any] = {
    **_SHARED, "hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], Any]] = {
    "Qwen3": lambda: Qwen3Config(**_QWEN3, num_hidden_layers=LAYERS),
    "GPT-2": lambda: GPT2Config(
        **_SHARED, n_embd=HIDDEN, n_layer=LAYERS, n_head=8, n_positions=128
    ),
    "Qwen3-MoE": lambda: Qwen3MoeConfig(
        **_QWEN3, num_hidden_layers=4, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=HIDDEN,
    ),
    "OPT": lambda: OPTConfig(
        **_SHARED, hidden_size=HIDDEN, ffn_dim=4 * HIDDEN, num_hidden_layers=LAYERS,
        num_attention_heads=8, word_embed_proj_dim=HIDDEN, max_position_embeddings=128,
        pad_token_id=1,
    ),
}  # fmt: skip
# A way of taking steps, and the seed of projections and rounding.
RUNS = {
    "fast": ("fast", 0), "plain": ("plain", 0), "autograd": ("autograd", 0),
    "plain, seed 1": ("plain", 1), "plain, seed 2": ("plain", 2),
}  # fmt: skip


def main() -> None:
    """Trains, prints and writes the file and the picture, or draws that of a file."""
    asked = _arguments()
    if asked.draw:
        asked.picture.write_text(picture(json.loads(asked.draw.read_text())))
        return
    device, began = machine.pick_device(asked.device), time.perf_counter()
    result = {
        **machine.origin(device),
        "rate": RATE, "steps": asked.steps, "samples": asked.samples,
        "context": CONTEXT, "learned": LEARNED,
        "families": {f: family(f, asked.samples, asked.steps, device) for f in asked.families},
        "seconds": time.perf_counter() - began,
    }  # fmt: skip
    result["versions"]["transformers"] = machine.installed("transformers")
    path = asked.out or machine.result_path("bench_losses", device)
    machine.write_json(path, result)
    asked.picture.write_text(picture(result))
    print(f"{result['seconds']:.1f} s; written to {path} and {asked.picture}")


def family(name: str, count: int, steps: int, device: torch.device) -> dict[str, Any]:
    """All runs of one family, from the same weights over the same samples."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[name](), dtype=torch.bfloat16).eval()
    learned, runs = samples(count), {}
    for run, (way, seed) in RUNS.items():
        runs[run] = trained(copy.deepcopy(model).to(device), way, seed, learned, steps)
        losses, graphs = runs[run]["losses"], f"{runs[run]['graphs']} graphs"
        told = runs[run]["refusal"] or graphs
        print(f"{name}, {run}: {losses[0]:.3f} to {losses[-1]:.3f}, {told}", flush=True)
    curves = {run: each["losses"] for run, each in runs.items()}
    plain = [run for run, (way, _) in RUNS.items() if way == "plain"]
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "apart": {run: apart(curves[run], curves["plain"]) for run in ("fast", "autograd")},
        "noise": max(apart(curves[a], curves[b]) for a, b in combinations(plain, 2)),
        "runs": runs,
    }


def trained(
    model: Any, way: str, seed: int, learned: list[TokenizedSample], steps: int
) -> dict[str, Any]:
    """The losses before each step, and how the steps were taken."""
    optimizer = Apollo(model.named_parameters(), lr=RATE, seed=seed)
    passes = None
    if way == "fast":
        speed_up(model)
        passes = CapturedPasses(model) if model.device.type == "cuda" else None
    began = time.perf_counter()
    losses = [
        autograd_step(model, optimizer, learned)
        if way == "autograd"
        else take_step(model, optimizer, learned, passes=passes).loss
        for _ in range(steps)
    ]
    return {
        "losses": losses,
        "seconds": time.perf_counter() - began,
        "graphs": len(passes) if passes is not None else 0,
        "refusal": passes.refusal if passes is not None else "",
    }


def autograd_step(model: Any, optimizer: Apollo, learned: list[TokenizedSample]) -> float:
    """One step with contexts frozen, of samples that are equally long; the loss before it."""

    def ids(rows: Iterator[tuple[int, ...]]) -> torch.Tensor:
        return torch.tensor(list(rows), device=model.device)

    with torch.no_grad():
        contexts = ids(sample.context_ids[:-1] for sample in learned)
        cache = model(contexts, use_cache=True, logits_to_keep=1).past_key_values
    inputs = ids((sample.context_ids[-1], *sample.continuation_ids[:-1]) for sample in learned)
    logits = model(inputs, past_key_values=cache, use_cache=True).logits
    targets = ids(sample.continuation_ids for sample in learned)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def samples(count: int) -> list[TokenizedSample]:
    """Seeded patterns of a few tokens, each repeated over its sample."""
    draw, made = random.Random(1), []
    for _ in range(count):
        pattern = [draw.randrange(3, VOCABULARY) for _ in range(PERIOD)]
        ids = tuple(pattern * ((CONTEXT + LEARNED) // PERIOD))
        made.append(TokenizedSample(ids[:CONTEXT], ids[CONTEXT:]))
    return made


def apart(one: list[float], other: list[float]) -> float:
    """The largest difference of two curves' losses at the same step, in nats."""
    return max(abs(a - b) for a, b in zip(one, other, strict=True))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES)[:3])
    add("--steps", type=int, default=STEPS)
    add("--samples", type=int, default=SAMPLES, help="of each step, the same ones in all")
    add("--out", type=Path, help="the JSON file")
    add("--picture", type=Path, default=PICTURE)
    add("--draw", type=Path, help="draw the picture of this JSON file, and train nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
