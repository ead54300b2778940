"""What training needs of a GPU, told by the training server's own command before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from apollo_client.command.outcome import REFUSED, fail


def told_memory(
    model: Path, step: str, gpu_memory_gb: float, *, as_json: bool, required: bool
) -> dict[str, Any] | None:
    """Runs `apollo-training-server memory`; its lines are printed as they are.

    Args:
        step: CONTEXT+CONTINUATION tokens; empty for a usual length.
        gpu_memory_gb: of the GPU; 0 for this machine's.
        as_json: they are returned instead.
        required: the command ends where it is not known; else it says so on stderr.
    """
    asked = [*(["--step", step] if step else ()), *(["--json"] if as_json else ())]
    if gpu_memory_gb:
        asked += ["--gpu-memory-gb", str(gpu_memory_gb)]
    done = subprocess.run(
        [sys.executable, "-m", "apollo_trainer.main", "memory", str(model), *asked],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        lines = done.stderr.strip().splitlines() or ["its command ended without a word"]
        unknown = f"what training needs of the GPU is not known: {lines[-1]}"
        if required:
            fail(unknown, REFUSED)
        typer.echo(unknown, err=True)
        return None
    if not as_json:
        typer.echo(done.stdout, nl=False)
        return None
    told: dict[str, Any] = json.loads(done.stdout)
    return told
