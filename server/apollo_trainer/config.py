"""The training server's settings: environment variables APOLLO_*, overridden by flags."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from apollo_grpc import locations

PREFIX = "APOLLO_"
# Read by the client, its command and the benchmarks, which share an environment with the server.
OTHERS = frozenset(
    {"APOLLO_TOKEN", "APOLLO_CA", "APOLLO_CERTIFICATE", "APOLLO_KEY", "APOLLO_COMMIT"}
)


class Settings(BaseSettings):
    """One setting a field; `--state-dir` on the command line is APOLLO_STATE_DIR outside it.

    `recover DIRECTORY` instead of settings settles a sync that was cut off, and serves nothing.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_kebab_case=True,
        cli_prog_name="apollo-training-server",
        extra="forbid",
    )

    state_dir: Path = Field(
        default_factory=locations.state_folder, description="folder of sockets and Apollo state"
    )
    checkpoint_dir: Path | None = Field(
        default=None,
        description="folder of manifests and snapshots; default: beside each model directory. On "
        "another disk a sync renames shard after shard",
    )
    address: str = Field(
        default_factory=locations.server_address,
        description="where clients connect: unix:PATH, or host:port with a token",
    )
    sidecar: str = Field(
        default_factory=locations.sidecar_address, description="where vLLM's sidecar listens"
    )
    token_file: Path | None = Field(
        default=None, description="token of TCP callers; default: 'token' in the state folder"
    )
    tls_certificate: Path | None = Field(default=None, description="PEM chain, for TCP")
    tls_key: Path | None = Field(default=None, description="PEM key, for TCP")
    tls_client_ca: Path | None = Field(default=None, description="PEM CA of clients, for mTLS")

    rank: int = Field(default=64, ge=1, description="of a new optimizer's projection")
    variant: Literal["channel", "mini"] = Field(default="channel", description="of APOLLO")
    rounding: Literal["stochastic", "nearest", "split16"] = Field(
        default="stochastic", description="of updates into 16-bit weights"
    )
    seed: int = Field(default=0, ge=0, description="of projections and rounding")

    check_values: bool = Field(
        default=True,
        description="compare the weights with the model directory at the first attach, and refuse "
        "those that cannot be compared",
    )
    check_all_values: bool = Field(
        default=False,
        description="compare every weight with the model directory at the first attach, "
        "not blocks of each",
    )
    probe_weights: bool = Field(
        default=True,
        description="change a few bytes of each kind of weight for a moment at the first attach, "
        "with vLLM paused, to see that it computes with them",
    )
    max_queued_runs: int = Field(default=64, ge=1, description="runs that may wait")
    max_queued_mebibytes: int = Field(
        default=4096,
        ge=1,
        description="of the specs of runs that wait, on disk; one that is larger may wait alone",
    )
    ledger_days: float = Field(
        default=30.0, gt=0, description="events and specs of ended runs are kept this long"
    )
    ledger_mebibytes: int = Field(
        default=256, ge=1, description="of the ledger; the oldest events go first"
    )
    save_seconds: float = Field(
        default=60.0,
        ge=0,
        description="between two saves of the Apollo state in a run; 0: not by time",
    )
    save_steps: int = Field(
        default=0, ge=0, description="steps between two saves in a run; 0: not by steps"
    )
    token_budget: int = Field(
        default=2048, ge=1, description="continuation tokens of one micro-batch, padding included"
    )
    undo_mebibytes: int = Field(
        default=512,
        ge=0,
        description="of memory for updates that can be taken back; none are kept of a model "
        "whose weights are larger",
    )
    sync_keeps_previous: bool = Field(
        default=True,
        description="the directory that a sync replaces stays on disk, whole for whoever holds it, "
        "until the sync after the next, which writes over its shards: that is many times faster "
        "where little changed. Two of them are kept, with what changed; they go where room is "
        "short",
    )
    snapshots_keep_memory: bool = Field(
        default=True,
        description="the memory that the first snapshot or restore takes, as much as the weights, "
        "is kept for the next one, which fresh memory would slow several times",
    )
    snapshot_mebibytes: int = Field(
        default=0, ge=0, description="of all snapshots of a model on disk; 0: no limit"
    )
    automatic_snapshots: int = Field(
        default=8, ge=1, description="that are kept; older ones are deleted"
    )
    snapshot_before_runs: bool = Field(
        default=False, description="take an automatic snapshot before each run"
    )
    snapshot_steps: int = Field(
        default=0, ge=0, description="steps between two automatic snapshots in a run; 0: none"
    )
    max_samples: int = Field(default=10_000, ge=1, description="samples of one run")
    max_streams: int = Field(
        default=256,
        ge=1,
        description="open at one time: of Train and checkpoint calls, and as many of WatchRun",
    )
    max_watchers: int = Field(
        default=1024,
        ge=1,
        description="streams of WatchStatus open at one time; those of one host over TCP may be "
        "half of them",
    )
    max_calls: int = Field(
        default=2048,
        ge=1,
        description="calls of all kinds open at one time; those of one host over TCP may be half "
        "of them",
    )
    lease_seconds: float = Field(
        default=10.0, gt=0, le=60, description="vLLM resumes by itself this long after a crash"
    )


def unknown_names(environment: Iterable[str]) -> list[str]:
    """Names of environment variables that look like settings and are none.

    A misspelt one would otherwise leave its setting at the default in silence.
    """
    known = OTHERS | {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    found = {name for name in environment if name.upper().startswith(PREFIX)}
    return sorted(name for name in found if name.upper() not in known)


def described(
    settings: Settings, environment: Mapping[str, str], arguments: Iterable[str]
) -> Iterator[str]:
    """Each setting with its value and where that came from, a line each."""
    flags = {a.removeprefix("--").partition("=")[0].replace("-", "_") for a in arguments}
    names = {name.upper() for name in environment}
    for name in Settings.model_fields:
        source = "default"
        if name in flags or f"no_{name}" in flags:
            source = "flag"
        elif f"{PREFIX}{name}".upper() in names:
            source = "environment"
        yield f"{name} = {getattr(settings, name)} ({source})"
