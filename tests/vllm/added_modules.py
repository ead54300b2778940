"""Run as a process of its own: the top names of what the sidecar imports beside vLLM's modules.

python -m tests.vllm.added_modules
"""

from __future__ import annotations

import sys

import vllm.entrypoints.openai.api_server  # noqa: F401  (what a vLLM without the sidecar has)
import vllm.v1.worker.worker_base as worker


def main() -> None:
    """Prints them in one line, the last."""
    before = set(sys.modules)
    from apollo_sidecar.plugin import register

    register()
    import apollo_sidecar.serving  # noqa: F401

    assert hasattr(worker.WorkerBase, "apollo_manifest")
    print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))


if __name__ == "__main__":
    main()
