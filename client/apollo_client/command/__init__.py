"""The `apollo` command."""

from apollo_client.command.app import main

__all__ = ["main"]
