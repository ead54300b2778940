"""Tokens of TCP callers: what may be one, and those that a server takes.

A server keeps SHA-256 of each. A slow hash protects words that people choose; ours have 256 random
bits, which no table and no search comes to, and each call would pay for the slowness.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from apollo_grpc.errors import InvalidArgument
from apollo_grpc.scopes import Scope

# Of a header's value: anything else grpc refuses in words of its own.
_TOKEN = re.compile(r"[ -~]+", re.ASCII)
HASHED = re.compile(
    r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,63}) (?P<scope>read|train|admin) "
    r"(?P<expires>never|\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ) sha256:(?P<digest>[0-9a-f]{64})",
    re.ASCII,
)
MAX_BYTES = 4096
MAX_FILE_BYTES = 2**20
_TIME = "%Y-%m-%dT%H:%M:%SZ"
NEVER = "never"


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


def read_text(path: Path, name: str) -> str:
    """A file of tokens, wherever that lies and links lead.

    Raises InvalidArgument where it cannot be read, or is larger than one can be.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise InvalidArgument.at(name, f"{path}: {error.strerror}") from error
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument.at(name, f"{path}: is larger than {MAX_FILE_BYTES} bytes")
    return data.decode("ascii", errors="replace")


def read_token(path: Path, name: str) -> str:
    """The token in a caller's file; of a server's own, the one that is not hashed.

    Raises InvalidArgument where the file cannot be read, or holds no token.
    """
    if (token := own_token(path, name)) is None:
        raise InvalidArgument.at(
            name, f"{path}: holds hashes, of which no token comes; it was shown when it was made"
        )
    return token


def own_token(path: Path, name: str) -> str | None:
    """The same; None where all are hashed."""
    text = read_text(path, name)
    lines = [line for line in text.splitlines() if not HASHED.fullmatch(line.strip())]
    if text.strip() and not "".join(lines).strip():
        return None
    return as_token("\n".join(lines), f"{name}: {path}")


def digest_of(token: str) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(token.encode("utf-8", "backslashreplace")).hexdigest()


@dataclass(frozen=True)
class Token:
    """What a server knows of one.

    Attributes:
        expires: from when on it is refused; None for never.
    """

    name: str
    scope: Scope
    digest: str
    expires: datetime.datetime | None = None

    def expired(self) -> bool:
        """Whether its time is over."""
        return self.expires is not None and datetime.datetime.now(datetime.UTC) >= self.expires

    def until(self) -> str:
        """When it expires, as files and lists have it."""
        return self.expires.strftime(_TIME) if self.expires else NEVER

    def line(self) -> str:
        """As the server's file has it; `token_of` reads it."""
        return f"{self.name} {self.scope.word} {self.until()} sha256:{self.digest}"


def token_of(found: re.Match[str], name: str) -> Token:
    """The token of a line that `HASHED` matches. Raises InvalidArgument for a time that is none."""
    expires = None
    if found["expires"] != NEVER:
        try:
            expires = datetime.datetime.strptime(found["expires"], _TIME)
        except ValueError as error:
            raise InvalidArgument.at(name, f"{found['expires']} is no time") from error
        expires = expires.replace(tzinfo=datetime.UTC)
    return Token(found["name"], Scope[found["scope"].upper()], found["digest"], expires)


class Tokens:
    """Those that a server takes; replaced as a whole, by any thread."""

    def __init__(self, tokens: Iterable[Token] = ()):
        self.all = tuple(tokens)

    def find(self, sent: str) -> Token | None:
        """The token that was sent, also one that has expired; None where there is no such one.

        How long it takes says nothing of what is right: digests are compared, and all of them.
        """
        digest, found = digest_of(sent), None
        for token in self.all:
            if hmac.compare_digest(token.digest, digest):
                found = token
        return found
