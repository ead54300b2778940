"""`apollo doctor MODEL`: will it work with mine? Serves the model apart from all else, and asks."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from apollo_client.aio import AsyncApolloClient
from apollo_client.command.children import attached, end
from apollo_client.command.cpu_choices import KV_CACHE, sizes_kv_cache
from apollo_client.command.display import Json
from apollo_client.command.ending import stated_cause
from apollo_client.command.gpu_memory import told_memory
from apollo_client.command.model_folder import model_folder
from apollo_client.command.outcome import REFUSED, reported_errors
from apollo_client.command.up import require_startable, trainer_child, vllm_child
from apollo_grpc.errors import Unavailable
from apollo_grpc.locations import private_folder, socket_address, state_folder
from apollo_grpc.v1 import status_pb2

# Compilation of a large model for a GPU takes minutes.
START_SECONDS = 1800.0
# Enough for the comparison; a long context would only ask for memory.
MAX_MODEL_LEN = 1024
LOG_LINES = 15
# Of refused weights; a model of 109 would fill the screen with one reason.
MAX_NAMED, MAX_REASON = 3, 200
_LENGTHS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")


@dataclass
class Diagnosis:
    """Whether a model can be trained while vLLM serves it, and what was found.

    Attributes:
        architecture: class of the training model; of config.json where none was built.
        parameters: of the training model, tied ones once; 0 where it came to no trace.
        views: those that are views of vLLM's weights.
        refused: name and reason of each that is none; the model's own where it is refused whole.
        derived: parameters that are none and stay as they are in the model directory.
        max_logprob_difference: in nats, between vLLM and transformers; None if not compared.
        detail: the verdict in words.
        memory: what a step needs of a GPU, as `apollo-training-server memory` tells it; None where
            nobody asked, and there is no GPU here.
    """

    model: str
    supported: bool = False
    architecture: str = ""
    parameters: int = 0
    views: int = 0
    refused: list[dict[str, str]] = field(default_factory=list)
    derived: list[str] = field(default_factory=list)
    max_logprob_difference: float | None = None
    detail: str = ""
    memory: dict[str, Any] | None = None

    def take(self, status: status_pb2.ServerStatus) -> None:
        """Fills in what the training server found."""
        found = status.weight_map
        self.supported = status.attachment == status_pb2.ATTACHMENT_STATE_ATTACHED
        self.architecture = found.architecture or self.architecture
        self.parameters, self.views = found.parameters, found.views
        self.detail, self.derived = status.attachment_detail, list(found.derived)
        self.refused = [{"name": r.name, "reason": r.reason} for r in found.refused]
        if self.supported:
            self.max_logprob_difference = status.logprob_difference
        elif not self.refused:
            self.refuse(self.detail)

    def refuse(self, reason: str) -> None:
        """The model as a whole cannot be trained."""
        self.detail = reason
        self.refused = [{"name": self.architecture or self.model, "reason": reason}]

    def lines(self) -> list[str]:
        """A line a subject."""
        rows = [
            ("model", self.model),
            ("architecture", self.architecture or "unknown"),
            ("parameters", f"{self.views} of {self.parameters} are views of vLLM's weights"),
            *(("refused", self._line(**refused)) for refused in self.refused[:MAX_NAMED]),
        ]
        if (more := len(self.refused) - MAX_NAMED) > 0:
            rows.append(("refused", f"and {more} more, all of which --json tells"))
        if self.refused and self.detail != self.refused[0]["reason"]:
            rows.append(("verdict", self.detail))
        if self.max_logprob_difference is not None:
            difference = f"log-probabilities within {self.max_logprob_difference:.1e} nats"
            rows.append(("agreement", difference))
        if self.supported and self.detail:
            rows.append(("detail", self.detail))
        rows.append(("supported", "yes" if self.supported else "no"))
        return [f"{name:<12} {value}" for name, value in rows]

    def _line(self, name: str, reason: str) -> str:
        """Of a tensor the reason is cut: a loader may tell all names that it knows instead."""
        long = len(reason) > MAX_REASON and reason != self.detail
        return f"{name}: {reason[: MAX_REASON - 3]}..." if long else f"{name}: {reason}"


def command(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="A directory, or a hub id that is in the cache.")],
    as_json: Json = False,
    all_values: Annotated[
        bool, typer.Option("--all-values", help="Compare every weight, not blocks of each.")
    ] = False,
    step: Annotated[
        str, typer.Option(help="Length of a training step: CONTEXT+CONTINUATION tokens.")
    ] = "",
    gpu_memory_gb: Annotated[
        float, typer.Option(help="Of the GPU, in 10^9 bytes, where it is another than this one.")
    ] = 0.0,
    memory_only: Annotated[
        bool, typer.Option("--memory-only", help="Tell of the GPU's memory; start nothing.")
    ] = False,
) -> None:
    """Tell whether MODEL can be trained while vLLM serves it; nothing of it is changed.

    Serves it with vLLM, maps its weights, compares both sides, and changes a few bytes for a moment
    to see that both compute with them, in a folder of its own: a server that runs already is left
    alone. What follows MODEL goes to vLLM. Before anything is started it tells what training needs
    of the GPU, and how much of it vLLM may take. Exit status 0 when the model is supported, 1 when
    not.
    """
    asked = bool(memory_only or step or gpu_memory_gb)
    model = model_folder(model) if memory_only else require_startable(model, context.args)
    told = None
    if asked or shutil.which("nvidia-smi"):
        told = told_memory(model, step, gpu_memory_gb, as_json=as_json, required=asked)
    if memory_only:
        if as_json:
            print(json.dumps(told))
        raise typer.Exit(0)
    with reported_errors():
        private_folder(state_folder())
        folder = Path(tempfile.mkdtemp(prefix="doctor-", dir=state_folder()))
        try:
            diagnosis = asyncio.run(_examine(model, folder, context.args, all_values))
        finally:
            shutil.rmtree(folder)
    diagnosis.memory = told
    print(json.dumps(asdict(diagnosis)) if as_json else "\n".join(diagnosis.lines()))
    raise typer.Exit(0 if diagnosis.supported else REFUSED)


async def _examine(model: Path, folder: Path, arguments: list[str], all_values: bool) -> Diagnosis:
    config = _config(model)
    diagnosis = Diagnosis(str(model), architecture=(config.get("architectures") or [""])[0])
    address, sidecar = (socket_address(folder / name) for name in ("t.sock", "s.sock"))
    settings = {"APOLLO_STATE_DIR": str(folder), "APOLLO_CHECK_ALL_VALUES": str(all_values)}
    # Whatever a server of the user's leaves out.
    settings |= {"APOLLO_CHECK_VALUES": "true", "APOLLO_PROBE_WEIGHTS": "true"}
    trainer = trainer_child(address, sidecar, **settings)
    served = [*served_length(config, arguments), *arguments]
    # Otherwise it would ask for most of the machine's memory beside a server that runs already.
    least = {KV_CACHE: "1"} if sizes_kv_cache(arguments) else {}
    vllm = vllm_child(model, "127.0.0.1", _free_port(), served, sidecar, **least)
    log = folder / "log"
    started = {child.name: await child.start() for child in (trainer, vllm)}
    pumps = [asyncio.create_task(_keep(process, log)) for process in started.values()]
    try:
        await _ask(diagnosis, address, started, log)
    finally:
        for process in started.values():
            await end(process)
        await asyncio.gather(*pumps)
    return diagnosis


async def _ask(
    diagnosis: Diagnosis,
    address: str,
    started: dict[str, asyncio.subprocess.Process],
    log: Path,
) -> None:
    """Waits for the training server's verdict, or for the end of a process."""
    async with AsyncApolloClient(address) as client:
        verdict = asyncio.create_task(attached(client))
        ends = {asyncio.create_task(p.wait()): name for name, p in started.items()}
        done, pending = await asyncio.wait(
            {verdict, *ends}, timeout=START_SECONDS, return_when=asyncio.FIRST_COMPLETED
        )
        for task in pending:
            task.cancel()
        if verdict in done:
            try:
                diagnosis.take(verdict.result())
            except Unavailable as error:
                diagnosis.refuse(error.message)
            return
    ended = [name for task, name in ends.items() if task in done]
    what = f"{ended[0]} ended by itself" if ended else f"no answer within {START_SECONDS:g} s"
    diagnosis.refuse(f"{what}: {stated_cause(log.read_text(errors='replace'))}")
    typer.echo(_tail(log), err=True)


async def _keep(process: asyncio.subprocess.Process, log: Path) -> None:
    """Writes what a process prints to the log; a pipe that nobody reads would block it."""
    assert process.stdout is not None
    with log.open("ab", buffering=0) as file:
        while chunk := await process.stdout.read(1 << 16):
            file.write(chunk)


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])


def _config(model: Path) -> dict[str, Any]:
    try:
        found = json.loads((model / "config.json").read_bytes())
    except ValueError:
        return {}  # vLLM says what is wrong with it.
    return found if isinstance(found, dict) else {}


def served_length(config: dict[str, Any], arguments: list[str]) -> list[str]:
    """`--max-model-len`, unless the user gave one or the model's own is not known."""
    # Of a model of several parts, the text's has its own.
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    found = [part.get(name) for part in parts for name in _LENGTHS]
    lengths = [length for length in found if isinstance(length, int)]
    if not lengths or any(argument.startswith("--max-model-len") for argument in arguments):
        return []
    return ["--max-model-len", str(min(*lengths, MAX_MODEL_LEN))]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
