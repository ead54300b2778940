"""The file of a server's tokens: made, read, read again, and edited by `apollo token`.

A line is `NAME SCOPE EXPIRES sha256:DIGEST`. One may be a bare token, which is an admin's: a server
makes one for its own user, whose client reads it.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition, InvalidArgument
from apollo_grpc.locations import private_folder
from apollo_grpc.scopes import Scope
from apollo_grpc.tokens import HASHED, Token, Tokens, as_token, digest_of, read_text, token_of

log = logging.getLogger(__name__)
FIELD = "token_file"
BARE = "bare"
# A word that people choose is found sooner than one of ours.
SHORT = 16


class TokenFile(Tokens):
    """A server's tokens, in `path`, made with one for its user where there is no file.

    Its own mode decides, not its folder's: Docker and Kubernetes mount secrets into open folders.

    Raises InvalidArgument where it holds none, FailedPrecondition where it cannot be made, or
    where others may write it: they would choose who may call.
    """

    def __init__(self, path: Path):
        self._path = path
        if not path.exists():
            _create(path)
        super().__init__(self._read())

    def reload(self) -> None:
        """Reads it again; open calls go on. Where it cannot be taken, the tokens before it stay."""
        try:
            self.all = self._read()
            log.info("%d tokens are in %s", len(self.all), self._path)
        except (InvalidArgument, FailedPrecondition) as error:
            log.error("the tokens before it stay: %s", error.message)

    def _read(self) -> tuple[Token, ...]:
        text = read_text(self._path, FIELD)
        _require_private(self._path)
        return parsed(text, f"{FIELD}: {self._path}")


def parsed(text: str, name: str) -> tuple[Token, ...]:
    """The tokens of a file's text.

    Args:
        name: of the file, for the error.

    Raises InvalidArgument where there is none, a line is none, or two have one name.
    """
    found, bare = list[Token](), list[str]()
    for line in filter(None, map(str.strip, text.splitlines())):
        if hashed := HASHED.fullmatch(line):
            found.append(token_of(hashed, name))
        else:
            bare.append(line)
    if bare or not found:
        # More than one is no file of tokens, but a key or a text.
        token = as_token("\n".join(bare), name)
        if " sha256:" in token:
            raise InvalidArgument.at(name, "has a line that is no token; mend or delete it")
        if len(token) < SHORT:
            log.warning("%s: the token is shorter than %d characters", name, SHORT)
        found.append(Token(BARE, Scope.ADMIN, digest_of(token)))
    names = [token.name for token in found]
    if twice := {each for each in names if names.count(each) > 1}:
        raise InvalidArgument.at(name, f"has two tokens named {min(twice)}; rename or remove one")
    return tuple(found)


def edit(path: Path, change: Callable[[tuple[Token, ...]], tuple[Token, ...]]) -> None:
    """Replaces a server's file by one with other tokens, whole or not at all; mode 0600.

    Raises what `change` does, InvalidArgument for a file that is none, FailedPrecondition where it
    cannot be written.
    """
    path = _place_of(path)
    try:
        with _alone(path.parent):
            text = read_text(path, FIELD) if path.exists() else ""
            before = parsed(text, f"{FIELD}: {path}") if text.strip() else ()
            kept = change(before)
            lines = [line for line in text.splitlines() if _is_bare(line) and BARE in _names(kept)]
            lines += [token.line() for token in kept if token.name != BARE]
            _replace(path, "".join(f"{line.strip()}\n" for line in lines))
    except OSError as error:
        raise _unusable(path, error) from error


def _place_of(path: Path) -> Path:
    """Where links lead. Raises InvalidArgument for what is there and no file, as a device is."""
    try:
        path = path.resolve()
        exists, is_file = path.exists(), path.is_file()
    except (OSError, RuntimeError) as error:
        raise InvalidArgument.at(FIELD, f"{path} is no path of a file") from error
    if exists and not is_file:
        raise InvalidArgument.at(FIELD, f"{path} is no file, and was left as it is")
    if not exists:
        private_folder(path.parent)
    return path


def _is_bare(line: str) -> bool:
    return bool(line.strip()) and not HASHED.fullmatch(line.strip())


def _names(tokens: tuple[Token, ...]) -> set[str]:
    return {token.name for token in tokens}


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _replace(path: Path, text: str) -> None:
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        _write(made, text)
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(descriptor)


def _create(path: Path) -> None:
    private_folder(path.parent)
    try:
        _write(path, secrets.token_urlsafe(32))
    except FileExistsError:
        return
    except OSError as error:
        # An empty one would be refused by the next start.
        path.unlink(missing_ok=True)
        raise _unusable(path, error) from error


def _require_private(path: Path) -> None:
    mode = path.stat().st_mode
    if mode & 0o022:
        raise FailedPrecondition(
            f"Others may write the token file {path}; nothing was opened. Run 'chmod go-w {path}'.",
            reason="TOKEN_FILE_NOT_PRIVATE",
        )
    if mode & 0o004 and path.parent.stat().st_mode & 0o001:
        log.warning("every user of this machine can read the token file %s", path)


def _unusable(path: Path, error: OSError) -> FailedPrecondition:
    return FailedPrecondition(
        f"The token file {path} cannot be written: {error.strerror}. Name one that can be with "
        "APOLLO_TOKEN_FILE.",
        reason="TOKEN_FILE_UNUSABLE",
    )
