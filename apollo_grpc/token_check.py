"""Judges callers over TCP by their token, before their message is read."""

from __future__ import annotations

import logging
import time
from typing import Any

from apollo_grpc.errors import PermissionDenied, Unauthenticated
from apollo_grpc.scopes import Scope, scope_of
from apollo_grpc.tokens import Token, Tokens, digest_of

log = logging.getLogger(__name__)
# However many guess, the log grows by a line in so many seconds.
LOG_SECONDS = 60.0
_SCHEME = "Bearer "


class TokenCheck:
    """Refuses callers over TCP that do not send `authorization: Bearer TOKEN`, or may do less.

    Unix sockets lie in a folder of the user's alone and need none.

    Args:
        tokens: those that are taken, or the one of an admin. Without any every TCP caller is
            refused.
    """

    def __init__(self, tokens: Tokens | str | None):
        if not isinstance(tokens, Tokens):
            digests = [digest_of(tokens)] if tokens else []
            tokens = Tokens(Token("bare", Scope.ADMIN, digest) for digest in digests)
        self._tokens, self._refused, self._told = tokens, 0, -LOG_SECONDS

    def __call__(self, context: Any, method: str = "") -> None:
        """Lets the caller of `context` go on.

        Args:
            method: as `/package.Service/Method`; without one, what a `read` token may do.

        Raises Unauthenticated without a token that is known and not expired, PermissionDenied where
        its scope does not include the method.
        """
        if str(context.peer()).startswith("unix:"):
            return
        sent = dict(context.invocation_metadata() or ()).get("authorization", "")
        if isinstance(sent, bytes):
            sent = sent.decode(errors="replace")
        scheme, token = sent[: len(_SCHEME)], self._tokens.find(sent[len(_SCHEME) :])
        if scheme != _SCHEME or token is None:
            self._tell(context.peer())
            raise Unauthenticated(
                "Calls over TCP need the header 'authorization: Bearer TOKEN'; nothing was done. "
                "The server's token is in the file 'token' of its state folder; 'apollo token add' "
                "makes others there."
            )
        _require_allowed(token, scope_of(method) if method else Scope.READ)

    def _tell(self, peer: str) -> None:
        self._refused += 1
        if time.monotonic() - self._told >= LOG_SECONDS:
            log.warning("%d calls without a known token; the last from %s", self._refused, peer)
            self._refused, self._told = 0, time.monotonic()


def _require_allowed(token: Token, needed: Scope) -> None:
    if token.expired():
        raise Unauthenticated(
            f"The token '{token.name}' expired at {token.until()}; nothing was done. Ask for "
            "another: 'apollo token add' on the server's machine makes one.",
            reason="TOKEN_EXPIRED",
        )
    if token.scope < needed:
        raise PermissionDenied(
            f"This call needs a token of scope '{needed.word}', and '{token.name}' is of "
            f"'{token.scope.word}'; nothing was done. 'apollo token add NAME --scope "
            f"{needed.word}' on the server's machine makes one.",
            reason="SCOPE_MISSING",
            metadata={"scope": needed.word},
        )
