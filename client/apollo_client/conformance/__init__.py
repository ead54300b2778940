"""`apollo-conformance`: does a server keep what the contract promises?"""

from apollo_client.conformance.command import main

__all__ = ["main"]
