"""A page about the training server, served to this machine's browser alone. Read only."""

from apollo_client.dashboard.server import Dashboard

__all__ = ["Dashboard"]
