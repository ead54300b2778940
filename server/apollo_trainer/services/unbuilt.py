"""What the contract has and this version does not."""

from __future__ import annotations

from typing import NoReturn

from apollo_grpc.errors import Unimplemented


def unbuilt(method: str) -> NoReturn:
    """Raises Unimplemented with one clear sentence."""
    raise Unimplemented(f"{method} is part of the contract and not built in this version yet.")
