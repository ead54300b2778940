"""Where a user's sockets, token and state lie: one private folder, never a shared one."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition

# sockaddr_un.sun_path holds 108 bytes on Linux, the closing NUL included (unix(7)).
MAX_SOCKET_PATH_BYTES = 107


def state_folder() -> Path:
    """$APOLLO_STATE_DIR, else $XDG_STATE_HOME/apollo, else ~/.local/state/apollo."""
    if chosen := os.environ.get("APOLLO_STATE_DIR"):
        return Path(chosen).expanduser().absolute()
    base = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    return Path(base).expanduser().absolute() / "apollo"


def private_folder(path: Path) -> Path:
    """Makes `path` with mode 0700, or checks that it is a folder of this user's alone.

    Parents that are missing are made private too: one of them may be asked for next.

    Raises FailedPrecondition when it cannot be made, or when another user owns it or can enter it:
    grpc makes sockets world-writable, so the folder's mode is what keeps others out.
    """
    try:
        for missing in [each for each in reversed(path.parents) if not each.exists()]:
            missing.mkdir(mode=0o700, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise FailedPrecondition(
            f"The folder {path} cannot be made: {error.strerror}. Choose another with "
            "APOLLO_STATE_DIR.",
            reason="STATE_FOLDER_UNUSABLE",
        ) from error
    found = path.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise FailedPrecondition(
            f"The folder {path} must belong to you alone (mode 0700); nothing was opened in it. "
            f"Run 'chmod 700 {path}' or choose another with APOLLO_STATE_DIR.",
            reason="STATE_FOLDER_NOT_PRIVATE",
        )
    return path


def sidecar_address() -> str:
    """gRPC address of the sidecar: $APOLLO_SIDECAR, else a unix socket in the state folder."""
    return os.environ.get("APOLLO_SIDECAR") or socket_address(state_folder() / "sidecar.sock")


def server_address() -> str:
    """gRPC address of the training server: $APOLLO_ADDRESS, else a unix socket."""
    return os.environ.get("APOLLO_ADDRESS") or socket_address(state_folder() / "training.sock")


def socket_address(path: Path) -> str:
    """`unix:PATH`. Raises FailedPrecondition when the kernel would refuse so long a path."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise FailedPrecondition(
            f"The socket path {path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes that Linux "
            "allows. Choose a shorter folder with APOLLO_STATE_DIR.",
            reason="SOCKET_PATH_TOO_LONG",
        )
    return f"unix:{path}"


def socket_path(address: str) -> Path | None:
    """The path of a `unix:` address; None for TCP."""
    return Path(address.removeprefix("unix:")) if address.startswith("unix:") else None
