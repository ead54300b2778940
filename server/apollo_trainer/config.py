"""The training server's settings: environment variables APOLLO_*, overridden by flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError

from apollo_grpc import locations
from apollo_grpc.addresses import require_address
from apollo_grpc.errors import ApolloError, InvalidArgument

PREFIX = "APOLLO_"
T = TypeVar("T")


def _refusing(check: Callable[[T], T]) -> Callable[[T], T]:
    """The check for pydantic, which knows errors of a value by ValueError."""

    def checked(value: T) -> T:
        try:
            return check(value)
        except ApolloError as error:
            raise ValueError(error.message.removeprefix("address: ")) from error

    return checked


def _not_empty(value: Any) -> Any:
    if value == "":
        raise ValueError("is empty; leave it out for the default")
    return value


def _listening(address: str) -> str:
    return require_address(address, listens=True)


def _of_sidecar(address: str) -> str:
    if locations.socket_path(address) is None:
        raise ValueError("vLLM's sidecar listens on a unix socket only; write unix:PATH")
    return require_address(address)


def roots_of(value: str) -> tuple[Path, ...]:
    """The folders of `export_roots`. Raises FailedPrecondition for one of nobody."""
    return tuple(locations.expanded(Path(each)) for each in value.split(":") if each)


def _known_roots(value: str) -> str:
    return ":".join(map(str, roots_of(value)))


Place = Annotated[Path, BeforeValidator(_not_empty), AfterValidator(_refusing(locations.expanded))]
Count = Annotated[int, Field(le=2**31 - 1)]
Seconds = Annotated[float, Field(le=1e9)]


def _in_state_dir(name: str) -> Callable[[dict[str, Any]], str]:
    def address(settings: dict[str, Any]) -> str:
        return locations.socket_address(settings["state_dir"] / name)

    return address


class Settings(BaseSettings):
    """One setting a field; `--state-dir` on the command line is APOLLO_STATE_DIR outside it.

    `recover DIRECTORY` instead of settings settles a sync that was cut off, and serves nothing.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_kebab_case=True,
        cli_prog_name="apollo-training-server",
        extra="forbid",
        # As compose and Kubernetes leave a variable that nobody gave a value.
        env_ignore_empty=True,
        allow_inf_nan=False,
        cli_implicit_flags=True,
    )

    state_dir: Place = Field(
        default_factory=locations.state_folder, description="folder of sockets and Apollo state"
    )
    checkpoint_dir: Place | None = Field(
        default=None,
        description="folder of manifests and snapshots; default: beside each model directory. On "
        "another disk a sync renames shard after shard",
    )
    address: Annotated[str, AfterValidator(_refusing(_listening))] = Field(
        default_factory=_in_state_dir("training.sock"),
        description="where clients connect: unix:PATH, or host:port with a token (port 0: one that "
        "the log tells); default: 'training.sock' in the state folder",
    )
    sidecar: Annotated[str, AfterValidator(_refusing(_of_sidecar))] = Field(
        default_factory=_in_state_dir("sidecar.sock"),
        description="where vLLM's sidecar listens; default: 'sidecar.sock' in the state folder",
    )
    token_file: Place | None = Field(
        default=None,
        description="tokens of TCP callers, as 'apollo token' makes them, read again at SIGHUP; "
        "default: 'token' in the state folder, or none where clients have certificates",
    )
    tls_certificate: Place | None = Field(default=None, description="PEM chain, for TCP")
    tls_key: Place | None = Field(default=None, description="PEM key, for TCP")
    tls_client_ca: Place | None = Field(default=None, description="PEM CA of clients, for mTLS")

    export_roots: Annotated[str, AfterValidator(_refusing(_known_roots))] = Field(
        default="",
        description="folders, with ':' between them, below which callers over TCP may have exports "
        "and copies made; default: the one that the model directory lies in",
    )
    metrics_address: Annotated[str, AfterValidator(_refusing(_listening))] | None = Field(
        default=None,
        description="host:port where Prometheus reads metrics, over HTTP: on this machine, or with "
        "the TLS files and token of TCP callers anywhere; default: none",
    )
    log_format: Literal["text", "json"] = Field(default="text", description="of each line")
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="lines of a lower one are left out"
    )

    rank: Count = Field(default=64, ge=1, description="of a new optimizer's projection")
    variant: Literal["channel", "mini"] = Field(default="channel", description="of APOLLO")
    rounding: Literal["stochastic", "nearest", "split16"] = Field(
        default="stochastic", description="of updates into 16-bit weights"
    )
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="of projections and rounding")

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
    max_queued_runs: Count = Field(default=64, ge=1, description="runs that may wait")
    max_queued_mebibytes: Count = Field(
        default=4096,
        ge=1,
        description="of the specs of runs that wait, on disk; one that is larger may wait alone",
    )
    ledger_days: float = Field(
        default=30.0,
        gt=0,
        le=36500,
        description="events and specs of ended runs are kept this long",
    )
    ledger_mebibytes: Count = Field(
        default=256, ge=1, description="of the ledger; the oldest events go first"
    )
    save_seconds: Seconds = Field(
        default=60.0,
        ge=0,
        description="between two saves of the Apollo state in a run; 0: not by time",
    )
    save_steps: Count = Field(
        default=0, ge=0, description="steps between two saves in a run; 0: not by steps"
    )
    token_budget: Count = Field(
        default=2048, ge=1, description="continuation tokens of one micro-batch, padding included"
    )
    undo_mebibytes: Count = Field(
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
    snapshot_mebibytes: Count = Field(
        default=0, ge=0, description="of all snapshots of a model on disk; 0: no limit"
    )
    automatic_snapshots: Count = Field(
        default=8, ge=1, description="that are kept; older ones are deleted"
    )
    snapshot_before_runs: bool = Field(
        default=False, description="take an automatic snapshot before each run"
    )
    snapshot_steps: Count = Field(
        default=0, ge=0, description="steps between two automatic snapshots in a run; 0: none"
    )
    max_samples: Count = Field(default=10_000, ge=1, description="samples of one run")
    max_dataset_samples: Count = Field(
        default=100_000,
        ge=1,
        description="of one dataset; a run of it holds their tokens in memory, some 40 bytes each",
    )
    dataset_mebibytes: Count = Field(
        default=4096, ge=1, description="of all datasets, in the state folder"
    )
    max_streams: Count = Field(
        default=256,
        ge=1,
        description="open at one time: of Train and checkpoint calls, and as many of "
        "WatchRun and WatchRuns",
    )
    max_watchers: Count = Field(
        default=1024,
        ge=1,
        description="streams of WatchStatus open at one time; those of one host over TCP may be "
        "half of them",
    )
    max_calls: Count = Field(
        default=2048,
        ge=1,
        description="calls of all kinds open at one time; those of one host over TCP may be half "
        "of them",
    )
    several_gpus: bool = Field(
        default=False,
        description="train a model that vLLM divides over several GPUs: written, and not run on "
        "such a machine yet",
    )
    serving_share: float = Field(
        default=0.92,
        ge=0,
        lt=1,
        description="of the tokens that vLLM would make undisturbed; steps wait where it makes "
        "fewer beside training; 0: no step waits",
    )
    gpu_percent: int = Field(
        default=25,
        ge=1,
        le=100,
        description="of the GPU's multiprocessors, on which steps run while vLLM decodes beside "
        "them by MPS; else they run on all",
    )
    lease_seconds: float = Field(
        default=10.0, gt=0, le=60, description="vLLM resumes by itself this long after a crash"
    )

    @model_validator(mode="after")
    def _whole_tls(self) -> Self:
        """Half of it would be plaintext, and all of it means nothing to a unix socket."""
        given = [n for n in ("tls_certificate", "tls_key", "tls_client_ca") if getattr(self, n)]
        lacking = {"tls_certificate", "tls_key"} - set(given)
        if given and lacking:
            raise ValueError(f"{given[0]} is set, and {sorted(lacking)[0]} is not; TLS needs both")
        if given and locations.socket_path(self.address) and not self.metrics_address:
            raise ValueError(f"{given[0]} is for TCP, and the address is a socket; leave it out")
        return self


def read_settings(arguments: list[str]) -> Settings:
    """The settings of a command line and the environment.

    Raises InvalidArgument, a line a setting that is wrong, and SystemExit for a flag that is none.
    """
    try:
        settings: Settings = CliApp.run(Settings, cli_args=arguments)
    except (ValidationError, SettingsError) as error:
        raise InvalidArgument("\n".join(_problems(error))) from error
    return settings


def _problems(error: ValidationError | SettingsError) -> list[str]:
    if isinstance(error, SettingsError):
        return [str(error)]
    return [
        f"{'.'.join(map(str, p['loc'])) or 'settings'}: {p['msg'].removeprefix('Value error, ')}"
        for p in error.errors()
        # What hangs on another setting that is wrong.
        if p["type"] != "default_factory_not_called"
    ]
