"""Where a user's sockets, token and state lie: one private folder, never a shared one."""

from __future__ import annotations

import fcntl
import os
import pwd
import stat
import tempfile
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition

# sockaddr_un.sun_path holds 108 bytes on Linux, the closing NUL included (unix(7)).
MAX_SOCKET_PATH_BYTES = 107
_UNIX = "unix:"
_ANOTHER = "choose another folder with APOLLO_STATE_DIR"


def state_folder() -> Path:
    """$APOLLO_STATE_DIR, else $XDG_STATE_HOME/apollo, else ~/.local/state/apollo.

    Raises FailedPrecondition where there is no home folder.
    """
    if chosen := os.environ.get("APOLLO_STATE_DIR"):
        return expanded(Path(chosen))
    base = Path(os.environ.get("XDG_STATE_HOME") or "")
    # A relative one is to be ignored (XDG Base Directory Specification, "Basics").
    return (base if base.is_absolute() else _home() / ".local" / "state") / "apollo"


def expanded(path: Path) -> Path:
    """The absolute path, `~` as shells have it. Raises FailedPrecondition for one of nobody."""
    first, *rest = path.parts or ("",)
    try:
        return _home().joinpath(*rest) if first == "~" else path.expanduser().absolute()
    except RuntimeError:
        raise FailedPrecondition(
            f"{path} names a user who is not known here; write the whole path.",
            reason="STATE_FOLDER_UNUSABLE",
        ) from None


def _home() -> Path:
    """$HOME, else that of the password database."""
    home = os.environ.get("HOME", "")
    if not home:
        try:
            home = pwd.getpwuid(os.geteuid()).pw_dir
        except KeyError:
            home = ""
    if not home.startswith("/"):
        what = f"HOME is '{home}', no absolute path" if home else "HOME is not set"
        raise FailedPrecondition(
            f"User {os.geteuid()} has no home folder here ({what}): {_ANOTHER}.",
            reason="STATE_FOLDER_UNUSABLE",
        )
    return Path(home)


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
        found = path.stat()
    except OSError as error:
        raise FailedPrecondition(
            f"The folder {path} cannot be made: {error.strerror}; {_ANOTHER}.",
            reason="STATE_FOLDER_UNUSABLE",
        ) from error
    mine = found.st_uid == os.geteuid()
    if not mine or stat.S_IMODE(found.st_mode) & 0o077:
        todo = f"Run 'chmod 700 {path}' or" if mine else f"User {found.st_uid} owns it;"
        raise FailedPrecondition(
            f"The folder {path} must belong to you alone (mode 0700); nothing was opened in it. "
            f"{todo} {_ANOTHER}.",
            reason="STATE_FOLDER_NOT_PRIVATE",
        )
    return path


def require_usable(folder: Path) -> None:
    """Tries what a server does there. Raises FailedPrecondition with the call that was refused."""
    call = "open"
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            call = "write"
            file.write(bytes(4096))
            file.flush()
            call = "fsync"
            os.fsync(file.fileno())
            call = "fdatasync"  # SQLite's
            os.fdatasync(file.fileno())
            call = "flock"
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise unusable(folder, error, call) from error


def unusable(path: Path, error: OSError, call: str = "") -> FailedPrecondition:
    """What is told where a file of the state folder cannot be written or locked.

    Args:
        call: of the system, where it refused one that file systems and containers may lack.
    """
    refused = f"{call}: {error.strerror}" if call else error.strerror
    return FailedPrecondition(
        f"{path} cannot be used ({refused}). Nothing was started; give the disk room, make it "
        f"writable, or {_ANOTHER}.",
        reason="STATE_FOLDER_UNUSABLE",
    )


def sidecar_address() -> str:
    """gRPC address of the sidecar: $APOLLO_SIDECAR, else a unix socket in the state folder."""
    return os.environ.get("APOLLO_SIDECAR") or socket_address(state_folder() / "sidecar.sock")


def server_address() -> str:
    """gRPC address of the training server: $APOLLO_ADDRESS, else a unix socket."""
    return os.environ.get("APOLLO_ADDRESS") or socket_address(state_folder() / "training.sock")


def socket_address(path: Path) -> str:
    """`unix:PATH`. Raises FailedPrecondition for a path that the kernel or grpc would refuse."""
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise FailedPrecondition(
            f"The socket path {path} is longer than the {MAX_SOCKET_PATH_BYTES} bytes that Linux "
            "allows. Choose a shorter folder with APOLLO_STATE_DIR.",
            reason="SOCKET_PATH_TOO_LONG",
        )
    if "," in str(path):
        raise FailedPrecondition(
            f"The socket path {path} holds a comma, at which gRPC would cut it; {_ANOTHER}.",
            reason="SOCKET_PATH_UNUSABLE",
        )
    return f"{_UNIX}{path}"


def socket_path(address: str) -> Path | None:
    """The absolute path of a `unix:` address, every character of which is its own; None for TCP."""
    return expanded(Path(address.removeprefix(_UNIX))) if address.startswith(_UNIX) else None
