"""What a small byte model learns with Apollo and with AdamW, on one grid of learning rates.

    python benchmarks/quality.py --device cuda --workers 4
    python benchmarks/quality.py --report benchmarks/results/quality-<device>-<day>.json

The first trains all runs and writes a JSON file, also after every run: started again with the same
--out it goes on. The second draws docs/quality-*.svg and writes docs/quality.md from such a file,
with --longer and --losses also from those of longer runs and of gpu/bench_losses.py, which draws
its own picture.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from fine_tuning import fine_tune
from machine import ROOT, origin, pick_device, result_path, write_json
from quality_report import write_report
from quality_summary import best_rates, best_summary
from training import OPTIONAL, VARIANTS, Plan, Variant, texts, train

RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
CHECKPOINT = "Apollo bf16 split16"
Task = tuple[Variant, Plan, float, int]


def main() -> None:
    """Trains the grid and the fine-tuning runs, or writes the report of a result."""
    args = _arguments()
    if args.report:
        others = [json.loads(f.read_text()) if f else None for f in (args.longer, args.losses)]
        written = write_report(json.loads(args.report.read_text()), *others, docs=args.docs)
        print("Written: " + ", ".join(str(path) for path in written))
        return
    torch.set_num_threads(args.threads)
    device = pick_device(args.device)
    plan = _plan(args, device)
    path = args.out or result_path("quality", device)
    result = _begin(path, plan, device)
    tasks = _tasks(args, plan, result["runs"])
    for record in _run_all(tasks, args.workers):
        result["runs"].append(record)
        _tell(record)
        _save(path, result)
    if args.fine_tune_steps and "fine_tune" not in result:
        rate = args.checkpoint_lr or best_rates(result["runs"]).get(CHECKPOINT, 3e-3)
        result["fine_tune"] = fine_tune(
            plan, args.fine_tune_steps, args.fine_tune_lr, rate, args.seeds, _tell
        )
    _save(path, result)
    for variant, best in result["best"].items():
        print(f"best: {variant:32} lr {best['lr']:<8g} {best['mean']:.4f}")
    print(f"Written to {path}")


def _tasks(args: argparse.Namespace, plan: Plan, done: list[dict[str, Any]]) -> list[Task]:
    """The runs that are still to be made, seed by seed."""
    known = {(run["variant"], run["lr"], run["seed"]) for run in done}
    names = args.variants
    chosen = [v for v in VARIANTS + OPTIONAL if re.search(names, v.name)] if names else VARIANTS
    return [
        (variant, plan, lr, seed)
        for seed in args.seeds
        for variant in chosen
        for lr in args.lrs
        if (variant.name, lr, seed) not in known
    ]


def _run_all(tasks: list[Task], workers: int) -> Iterator[dict[str, Any]]:
    """Records in the order of the tasks. A small model leaves a GPU idle: workers share it."""
    if workers <= 1:
        yield from map(_run, tasks)
        return
    threads = torch.get_num_threads()
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=torch.set_num_threads,
        initargs=(threads,),
    ) as pool:
        yield from pool.map(_run, tasks)


def _run(task: Task) -> dict[str, Any]:
    return train(*task)[1]


def _begin(path: Path, plan: Plan, device: torch.device) -> dict[str, Any]:
    """A new result, or the unfinished one at `path`. Raises SystemExit where its plan differs."""
    settings = json.loads(json.dumps(asdict(plan)))
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        if result["plan"] != settings:
            raise SystemExit(f"{path} was made with other settings; give another --out.")
        return result
    text = texts(plan.device, plan.text_bytes)[0].describe()
    return {**origin(device), "plan": settings, "text": text, "runs": []}


def _save(path: Path, result: dict[str, Any]) -> None:
    result["best"] = best_summary(result["runs"])
    write_json(path, result)


def _tell(run: dict[str, Any]) -> None:
    final = "diverged" if run["final"] is None else f"{run['final']:.4f}"
    name, lr, seed = run["variant"], run["lr"], run["seed"]
    print(f"{name:32} lr {lr:<8g} seed {seed}: {final} ({run['seconds']:.1f} s)", flush=True)


def _plan(args: argparse.Namespace, device: torch.device) -> Plan:
    return Plan(
        device=device.type,
        steps=args.steps,
        batch=args.batch,
        context=args.context,
        width=args.width,
        layers=args.layers,
        text_bytes=args.text_bytes,
        validation_windows=args.validation_windows,
        evaluations=args.evaluations,
        warmup_steps=max(1, args.steps // 10),
        last_rate=0.1,
        weight_decay=args.weight_decay,
        betas=(args.beta1, args.beta2),
        clip=args.clip,
        impl=args.impl,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--report", type=Path, help="write the report of this JSON file, and train nothing")
    add("--longer", type=Path, help="with --report: a JSON file of the same runs with more steps")
    add("--losses", type=Path, help="with --report: a JSON file of gpu/bench_losses.py")
    add("--docs", type=Path, default=ROOT / "docs", help="where the report goes")
    add("--out", type=Path, help="the JSON file")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    add("--workers", type=int, default=1, help="processes that train side by side")
    add("--threads", type=int, default=1, help="of the CPU, in each process")
    add("--variants", default="", help="regular expression; the optional ones only if it matches")
    add("--lrs", type=float, nargs="+", default=RATES)
    add("--seeds", type=int, nargs="+", default=(0, 1, 2))
    add("--steps", type=int, default=400)
    add("--batch", type=int, default=32)
    add("--context", type=int, default=256)
    add("--width", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--text-bytes", type=int, default=8 * 10**6)
    add("--validation-windows", type=int, default=256)
    add("--evaluations", type=int, default=20, help="points of a curve")
    add("--weight-decay", type=float, default=0.01)
    add("--beta1", type=float, default=0.9)
    add("--beta2", type=float, default=0.999)
    add("--clip", type=float, default=1.0, help="largest norm of the gradient, for all variants")
    add("--impl", default="auto", choices=("auto", "reference", "fused"))
    add("--fine-tune-steps", type=int, default=400, help="0 leaves the fine-tuning out")
    add("--fine-tune-lr", type=float, default=1e-5)
    add("--checkpoint-lr", type=float, help=f"default: the best of {CHECKPOINT!r}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
