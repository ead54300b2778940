"""On the path of a command that starts vLLM: its other processes are forked from the first."""

from tests.fork_server import fork_where_vllm_spawns

fork_where_vllm_spawns()
