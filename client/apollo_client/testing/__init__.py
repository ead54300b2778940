"""A training server without a model, for the tests of programs that use one."""

from apollo_client.testing.script import Script
from apollo_client.testing.server import FakeServer

__all__ = ["FakeServer", "Script"]
