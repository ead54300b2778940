"""`apollo up MODEL`: vLLM with the sidecar, and the training server, as two children."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from apollo_client.command.children import Child, Children
from apollo_client.command.cores import split_cores
from apollo_client.command.cpu_choices import KV_CACHE, eager, kv_cache
from apollo_client.command.gpu_sharing import GpuSharing, shared_gpu
from apollo_client.command.http_address import answers, url, why_not_free
from apollo_client.command.model_folder import model_folder, why_not_servable
from apollo_client.command.outcome import REFUSED, WRONG_INPUT, fail, reported_errors
from apollo_client.command.vllm_options import told, workers
from apollo_client.connection import find_server
from apollo_grpc.locations import private_folder, sidecar_address, state_folder

_NAME = "apollo"  # the plugin's, as vLLM knows it
_VLLM = "vllm.entrypoints.openai.api_server"
# No download, no report to anybody, unless the user's own environment says otherwise.
_QUIET = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
_NEEDED = {"vllm": "'apollo-grpc[vllm]', or [cpu]", "transformers": "'apollo-grpc[server]'"}


def command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A directory, or a hub id that is in the cache.")],
    host: Annotated[str, typer.Option(help="Where vLLM's HTTP API listens.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Its port.")] = 8000,
    gpu_sharing: Annotated[
        GpuSharing,
        typer.Option(
            help="Both programs on one GPU: side by side (mps), by turns (time), or as can be."
        ),
    ] = GpuSharing.AUTO,
) -> None:
    """Serve MODEL with vLLM and train it: starts both, ends both on Ctrl-C.

    What follows MODEL goes to vLLM: apollo up MODEL --max-model-len 4096

    Where vLLM computes on the CPU, it starts without compilation (--no-enforce-eager compiles), and
    its KV cache leaves room for training (VLLM_CPU_KVCACHE_SPACE, in GiB, says how large it is).
    """
    folder = require_startable(model, context.args)
    # A hub id is what callers will ask vLLM for; whatever the user says comes later, and counts.
    named = [] if folder == model else ["--served-model-name", str(model)]
    with reported_errors():
        private_folder(state_folder())
        # An address of another server's would be trained in silence.
        address = context.obj.address or find_server().address
        _require_free(host, port, address, context.args)
        settings, notes = _cpu_settings(folder, context.args)
        arguments = [*named, *context.args]
        with shared_gpu(gpu_sharing, state_folder()) as shared:
            settings |= shared.both
            vllm = vllm_child(folder, host, port, arguments, sidecar_address(), **settings)
            trainer = replace(
                trainer_child(address, sidecar_address(), **shared.both, **shared.trainer),
                before_kill=shared.before_kill,
            )
            both = Children(vllm, trainer, address, notes=[*notes, *shared.notes])
            status = asyncio.run(both.run())
    raise typer.Exit(status)


def require_startable(model: Path, arguments: list[str]) -> Path:
    """The directory of MODEL.

    Ends the command where there is none, or it is not whole, or what serves it is not installed.

    Args:
        arguments: vLLM's.
    """
    folder = model_folder(model)
    if why := why_not_servable(folder, arguments):
        fail(why, WRONG_INPUT)
    for module, extra in _NEEDED.items():
        if importlib.util.find_spec(module) is None:
            fail(f"{module} is not installed here: pip install {extra}.", WRONG_INPUT)
    return folder


def _require_free(host: str, port: int, address: str, arguments: list[str]) -> None:
    """Ends the command where somebody else has one of the addresses."""
    if not told(arguments, "--uds") and (why := why_not_free(host, port)):
        fail(why, REFUSED)
    for taken, what in ((address, "A training server"), (sidecar_address(), "vLLM's sidecar")):
        if answers(taken):
            fail(
                f"{what} runs already at {taken}. Nothing was started. End it first, or give this "
                "one a folder of its own with APOLLO_STATE_DIR.",
                REFUSED,
            )


def _cpu_settings(model: Path, arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Environment variables of vLLM's on a CPU, and what is said of its choices."""
    settings, chosen = {}, []
    if cache := kv_cache(model, arguments):
        settings[KV_CACHE] = str(cache.gib)
        free = f"{cache.free / 2**30:.1f} GiB free"
        chosen.append(f"a KV cache of {cache.gib} GiB of {free} ({KV_CACHE}=GIB changes it)")
    if eager(arguments):
        chosen.append("no compilation (--no-enforce-eager compiles)")
    return settings, [f"on the CPU: {', '.join(chosen)}"] if chosen else []


def vllm_child(
    model: Path, host: str, port: int, arguments: list[str], sidecar: str, **settings: str
) -> Child:
    """vLLM's API server, on its part of the cores when it computes on them.

    Args:
        settings: environment variables of its own.
    """
    environment = os.environ | {"VLLM_PLUGINS": _NAME, "APOLLO_SIDECAR": sidecar} | settings
    count = workers(arguments)
    cores = split_cores(count)
    if cores:
        environment.setdefault("VLLM_CPU_OMP_THREADS_BIND", cores.bound(count))
    served = ["--model", str(model.absolute()), "--host", host, "--port", str(port)]
    scheme = "https" if told(arguments, "--ssl-certfile") else "http"
    apart = told(arguments, "--uds")
    return Child(
        name="vllm",
        command=[sys.executable, "-m", _VLLM, *served, *eager(arguments), *arguments],
        environment=_QUIET | environment,
        cores=cores.engine if cores else None,
        listens=None if apart else (host, port),
        url="the socket of --uds" if apart else url(host, port, scheme),
    )


def trainer_child(address: str, sidecar: str, **settings: str) -> Child:
    """The training server, on the other cores.

    Args:
        settings: environment variables of its own.
    """
    environment = os.environ | {"APOLLO_ADDRESS": address, "APOLLO_SIDECAR": sidecar} | settings
    cores = split_cores()
    if cores:
        environment.setdefault("OMP_NUM_THREADS", str(len(cores.trainer)))
    return Child(
        name="trainer",
        command=[sys.executable, "-m", "apollo_trainer.main"],
        environment=_QUIET | environment,
        cores=cores.trainer if cores else None,
    )
