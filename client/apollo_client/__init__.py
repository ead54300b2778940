"""The Python client of the training server, blocking and asyncio, and the `apollo` command."""
