"""Who may call a server: its tokens, its TLS, and where it listens."""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from apollo_grpc.interceptors import Check
from apollo_grpc.locations import socket_path
from apollo_grpc.token_check import TokenCheck
from apollo_grpc.token_file import TokenFile
from apollo_grpc.transport import ServerTls
from apollo_trainer.config import Settings

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Guard:
    """What stands before one address.

    Attributes:
        check: judges each call; None where a certificate says all.
    """

    check: Check | None
    tokens: TokenFile | None = None
    tls: ServerTls | None = None


class Guards:
    """Those of a server's addresses.

    Callers on a unix socket need no token, nor do those with a certificate, unless a token's file
    was named as well.
    """

    def __init__(self, settings: Settings):
        self._settings = settings

    def of_address(self) -> Guard:
        """Of the address of calls. Raises as `of_tcp`."""
        return Guard(TokenCheck(None)) if socket_path(self._settings.address) else self.of_tcp

    @cached_property
    def of_tcp(self) -> Guard:
        """Of any TCP address. Raises as `TokenFile`."""
        settings, tls = self._settings, None
        if settings.tls_certificate and settings.tls_key:
            tls = ServerTls(settings.tls_certificate, settings.tls_key, settings.tls_client_ca)
            if tls.client_ca and settings.token_file is None:
                return Guard(None, tls=tls)
        tokens = TokenFile(settings.token_file or settings.state_dir / "token")
        return Guard(TokenCheck(tokens), tokens, tls)

    def reload(self) -> None:
        """Reads the tokens again, of addresses that ask for any."""
        if (tokens := vars(self).get("of_tcp", Guard(None)).tokens) is None:
            log.info("no caller needs a token here; nothing was read again")
        else:
            tokens.reload()

    def listen(self, loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> None:
        """Has SIGHUP read the tokens again, or end the server with the terminal that it is in."""
        of_terminal = sys.stderr.isatty()

        def hung_up() -> None:
            # A terminal that was closed is none any more.
            if of_terminal and not sys.stderr.isatty():
                stop()
            else:
                loop.run_in_executor(None, self.reload)

        loop.add_signal_handler(signal.SIGHUP, hung_up)
