"""What a model directory calls the tensors of its text part.

A wrapper keeps its text part under a prefix that transformers' class of the text alone does not
know. Which one is read off the names that the directory holds; vLLM's loader then confirms it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from apollo_trainer.weights.loaded_files import loaded_shards
from apollo_trainer.weights.manifest import refusal

MAX_NAMED = 5


def held_names(directory: Path) -> frozenset[str]:
    """Names of the tensors in the safetensors that are loaded; none where they cannot be read.

    What cannot be read is refused where its values are needed.
    """
    names = set[str]()
    try:
        for shard in loaded_shards(directory):
            with safe_open(shard, framework="pt") as file:
                names.update(file.keys())
    except (SafetensorError, ValueError, OSError):
        return frozenset()
    return frozenset(names)


@dataclass(frozen=True)
class Prefix:
    """How names of the directory follow from those of the text model.

    Attributes:
        own: what the names of the text model's decoder begin with, such as "model.".
        there: what those of the same tensors in the directory do.
    """

    own: str
    there: str

    def name(self, name: str, held: Collection[str]) -> str:
        """What the directory calls a tensor; a head may lie beside the decoder, or above it."""
        if name.startswith(self.own):
            return self.there + name.removeprefix(self.own)
        beside = self.there.removesuffix(self.own) + name
        return beside if beside in held else name


def find_prefix(names: Collection[str], own: str, held: Collection[str]) -> Prefix | None:
    """The prefix under which the directory holds all of these names; None where it does not.

    Raises FailedPrecondition where it holds them twice, and neither under the model's own names.
    """
    found = set(_fitting(names, own, held))
    if (unchanged := Prefix(own, own)) in found:
        return unchanged
    if len(found) > 1:
        held_twice = " and ".join(sorted(f"{prefix.there}*" for prefix in found))
        raise refusal(
            "TEXT_PART_UNKNOWN",
            f"The model directory holds {held_twice}, and it is not known which of them vLLM "
            "serves as the text part. Serve a directory that holds one.",
        )
    return next(iter(found), None)


def _fitting(names: Collection[str], own: str, held: Collection[str]) -> Iterator[Prefix]:
    tail = max((n.removeprefix(own) for n in names if n.startswith(own)), key=len, default="")
    for name in held:
        if tail and f".{name}".endswith(f".{tail}"):
            prefix = Prefix(own, name.removesuffix(tail))
            if all(prefix.name(each, held) in held for each in names):
                yield prefix


def shared_prefix(names: Collection[str]) -> str:
    """The longest that all begin with, up to a dot and with it."""
    # What the first and the last in order begin with, all between them do.
    first, last = min(names, default=""), max(names, default="")
    same = [
        a for a, _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    ]
    owner, dot, _ = "".join(same).rpartition(".")
    return owner + dot


def told_parts(trained: Collection[str], others: Collection[str]) -> str:
    """Which part of a directory is trained and which is not, in a sentence; empty for all of it."""
    if not others:
        return ""
    return (
        f"Trained is {_listed(trained, others)}. The rest stays as it is, made for the weights "
        f"before training: {_listed(others, trained)}."
    )


def _listed(names: Collection[str], apart_from: Collection[str]) -> str:
    """The parts that hold these names and none of the others."""
    shared = {prefix for name in apart_from for prefix in _prefixes(name)}
    parts = dict[str, int]()
    for name in sorted(names):
        part = next((p for p in _prefixes(name) if p not in shared), name)
        parts[part] = parts.get(part, 0) + 1
    tensors = [f"{part} ({count} tensor{'s' * (count > 1)})" for part, count in parts.items()]
    more = [f"{len(tensors) - MAX_NAMED} more parts"] if len(tensors) > MAX_NAMED else []
    return ", ".join([*tensors[:MAX_NAMED], *more])


def _prefixes(name: str) -> list[str]:
    """Of a dotted name, the shortest first; not the name itself."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
