"""The token of TCP callers: what may be one, and the file that it lies in."""

from __future__ import annotations

import logging
import os
import re
import secrets
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.locations import private_folder

log = logging.getLogger(__name__)
# Of a header's value: anything else grpc refuses in words of its own.
_TOKEN = re.compile(r"[ -~]+", re.ASCII)
MAX_BYTES = 4096


def as_token(text: str, name: str) -> str:
    """The token without white space around it, as an editor or a secret's file leaves it.

    Args:
        name: of what holds it, for the error.

    Raises InvalidArgument where it is empty, or no value of a header.
    """
    token = text.strip()
    if not token:
        raise InvalidArgument.at(name, "is empty; put a token there, or leave it unset")
    if len(token) > MAX_BYTES or not _TOKEN.fullmatch(token):
        raise InvalidArgument.at(
            name, f"is no token: one line of at most {MAX_BYTES} ASCII characters"
        )
    return token


def read_token(path: Path, name: str) -> str:
    """The token in a file, wherever that lies and links lead.

    Raises InvalidArgument where the file cannot be read, or holds no token.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 2).decode("ascii", errors="replace")
    except OSError as error:
        raise InvalidArgument.at(name, f"{path}: {error.strerror}") from error
    return as_token(text, f"{name}: {path}")


def read_or_create_token(path: Path) -> str:
    """A server's token in `path`, made with mode 0600, in a private folder, where there is none.

    Its own mode decides, not its folder's: Docker and Kubernetes mount secrets into open folders.

    Raises InvalidArgument where it holds no token, FailedPrecondition where it cannot be made, or
    where others may write it: they would choose who may call.
    """
    if not path.exists():
        return _created(path)
    token, mode = read_token(path, "token_file"), path.stat().st_mode
    if mode & 0o022:
        raise FailedPrecondition(
            f"Others may write the token file {path}; nothing was opened. Run 'chmod go-w {path}'.",
            reason="TOKEN_FILE_NOT_PRIVATE",
        )
    if mode & 0o004 and path.parent.stat().st_mode & 0o001:
        log.warning("every user of this machine can read the token file %s", path)
    return token


def _created(path: Path) -> str:
    private_folder(path.parent)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(token := secrets.token_urlsafe(32))
        except OSError:
            # An empty one would be refused by the next start.
            path.unlink()
            raise
    except FileExistsError:
        return read_token(path, "token_file")
    except OSError as error:
        raise FailedPrecondition(
            f"The token file {path} cannot be made: {error.strerror}. Name one that can be read "
            "with APOLLO_TOKEN_FILE.",
            reason="TOKEN_FILE_UNUSABLE",
        ) from error
    return token
