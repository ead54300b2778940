"""Which safetensors of a model directory are loaded, by vLLM and by transformers.

vLLM 0.32 (default_loader.py, `_prepare_weights`): consolidated*.safetensors where there are any,
else all of them; of those the ones that their index names, where there is an index. transformers 5
(modeling_utils.py, `_get_resolved_checkpoint_files`): model.safetensors, else those of the index.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

SUFFIX = ".safetensors"
SINGLE, INDEX = f"model{SUFFIX}", f"model{SUFFIX}.index.json"
_CONSOLIDATED = "consolidated"


@dataclass(frozen=True)
class LoadedFiles:
    """Names of a directory's safetensors that are loaded, sorted."""

    by_vllm: list[str]
    by_transformers: list[str]

    @property
    def by_either(self) -> list[str]:
        """Those that one of them loads, sorted."""
        return sorted({*self.by_vllm, *self.by_transformers})


def choose_files(names: list[str], read: Callable[[str], bytes]) -> LoadedFiles:
    """The files of a directory that are loaded.

    Args:
        names: all that is in it, sorted.
        read: a file of it by name.

    Raises ValueError for an index that is none, or that names files that are not there; OSError.
    """
    shards = [name for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
    mistral = [name for name in shards if name.startswith(_CONSOLIDATED)]
    index = f"{_CONSOLIDATED}{SUFFIX}.index.json" if mistral else INDEX
    of_vllm = _indexed(index, mistral or shards, names, read)
    if SINGLE in shards:
        return LoadedFiles(of_vllm, [SINGLE])
    of_transformers = _indexed(INDEX, shards, names, read) if mistral else of_vllm
    return LoadedFiles(of_vllm, of_transformers)


def _indexed(
    index: str, shards: list[str], names: list[str], read: Callable[[str], bytes]
) -> list[str]:
    if index not in names:
        return shards
    try:
        listed = _listed(read(index))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{index} cannot be read ({error})") from error
    if absent := listed - set(shards):
        raise ValueError(f"{index} names {min(map(str, absent))[:80]!r}, which is not there")
    return [name for name in shards if name in listed]


# A sync asks several times, and the index of a large mixture takes 30 ms.
@lru_cache(maxsize=2)
def _listed(index: bytes) -> frozenset[str]:
    return frozenset(json.loads(index)["weight_map"].values())


def loaded_shards(directory: Path) -> list[Path]:
    """Paths of the files that vLLM or transformers loads, vLLM's last: theirs are what is served.

    Raises ValueError, and OSError.
    """
    names = sorted(path.name for path in directory.iterdir())
    files = choose_files(names, lambda name: (directory / name).read_bytes())
    by_vllm = set(files.by_vllm)
    return [directory / name for name in sorted(files.by_either, key=lambda n: (n in by_vllm, n))]
