"""A file system in memory that knows what a power failure may leave of it.

The model is a weak one. A write is on disk after the file's fsync, a name after the fsync of every
folder that it concerns. What is not may be there or not, each 512 bytes and each name for itself,
in any combination. A rename or an exchange is there whole or not at all.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load

from apollo_trainer.checkpoints.disk.file_ops import FileOps
from apollo_trainer.checkpoints.disk.shard_header import LENGTH, parse_metadata

SECTOR = 512
Name = tuple[int, str]


class PowerFailure(BaseException):
    """The machine goes off. No handler of the product's may catch it."""


@dataclass
class Node:
    """A file, folder or link: as the running system sees it, and as it surely is on disk."""

    kind: int
    mode: int = 0o644
    data: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[tuple[int, bytes]] = field(default_factory=list)
    entries: dict[str, int] = field(default_factory=dict)
    target: str = ""
    time: int = 0


@dataclass
class Change:
    """One operation on names: all of it is on disk, or nothing."""

    number: int
    names: dict[Name, int | None]
    waits: set[int]


class MemoryFiles(FileOps):
    """The product's `FileOps` on such a file system.

    Attributes:
        before: called before every operation that changes anything.
        without: numbers of the fsyncs that do nothing.
        flushes: what every fsync was of, in order.
    """

    def __init__(self) -> None:
        self.nodes = {1: Node(stat.S_IFDIR)}
        self.on_disk: dict[Name, int] = {}
        self.settled: dict[Name, int] = {}
        self.changes: list[Change] = []
        self.files: dict[int, int] = {}
        self.before: Callable[[], None] = lambda: None
        self.without: set[int] = set()
        self.flushes: list[str] = []
        self.exchanges = True
        self.clones = False
        self._numbers = iter(range(2, 1 << 60))
        self._clock = 0

    # --- the crash --------------------------------------------------------------------------

    def after_crash(self, rng: random.Random) -> MemoryFiles:
        """One file system that a power failure may leave now."""
        keep, names, settled = _keeper(rng), dict(self.on_disk), dict(self.settled)
        for change in keep(self.changes):
            _apply(change, names, settled)
        image = MemoryFiles()
        image._numbers, image._clock = self._numbers, self._clock
        image.exchanges, image.clones = self.exchanges, self.clones
        image.nodes = {
            number: Node(node.kind, node.mode, target=node.target, time=node.time)
            for number, node in self.nodes.items()
        }
        for number, node in self.nodes.items():
            data = bytearray(node.durable)
            for offset, piece in keep(node.pending):
                data.extend(bytes(max(0, offset + len(piece) - len(data))))
                data[offset : offset + len(piece)] = piece
            image.nodes[number].data, image.nodes[number].durable = data, bytes(data)
        for (folder, name), number in names.items():
            image.nodes[folder].entries[name] = number
        image.on_disk = names
        return image

    def settle(self) -> None:
        """Everything is on disk."""
        for node in self.nodes.values():
            node.durable, node.pending = bytes(node.data), []
        for change in self.changes:
            _apply(change, self.on_disk, self.settled)
        self.changes, self.flushes = [], []

    # --- names ------------------------------------------------------------------------------

    def _at(self, path: Path) -> tuple[int, str]:
        """The folder that a path is in, and its name there."""
        number = 1
        for part in path.parts[1:-1]:
            number = self._entry(number, part, path)
        return number, path.name

    def _entry(self, folder: int, name: str, path: Path) -> int:
        found = self.nodes[folder].entries.get(name)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return found

    def _node(self, path: Path) -> tuple[int, Node]:
        if len(path.parts) == 1:
            return 1, self.nodes[1]
        number = self._entry(*self._at(path), path)
        return number, self.nodes[number]

    def _change(self, names: dict[Name, int | None]) -> None:
        self.before()
        for (folder, name), number in names.items():
            if number is None:
                self.nodes[folder].entries.pop(name)
            else:
                self.nodes[folder].entries[name] = number
        self.changes.append(Change(next(self._numbers), names, {folder for folder, _ in names}))

    def _new(self, path: Path, node: Node) -> int:
        at, number = self._at(path), next(self._numbers)
        if at[1] in self.nodes[at[0]].entries:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        self.nodes[number] = node
        self._touch(node)
        self._change({at: number})
        return number

    def _touch(self, node: Node) -> None:
        self._clock += 1
        node.time = self._clock

    def rename(self, source: Path, target: Path) -> None:
        number = self._node(source)[0]
        self._change({self._at(source): None, self._at(target): number})

    def exchange(self, one: Path, other: Path) -> None:
        if not self.exchanges:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        numbers = self._node(one)[0], self._node(other)[0]
        self._change({self._at(one): numbers[1], self._at(other): numbers[0]})

    def rename_new(self, source: Path, target: Path) -> None:
        if self.found(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        self.rename(source, target)

    def link(self, source: Path, target: Path) -> None:
        self._change({self._at(target): self._node(source)[0]})

    def symlink(self, points_to: str, path: Path) -> None:
        self._new(path, Node(stat.S_IFLNK, target=points_to))

    def unlink(self, path: Path) -> None:
        self._node(path)
        self._change({self._at(path): None})

    def mkdir(self, folder: Path, mode: int = 0o700) -> None:
        self._new(folder, Node(stat.S_IFDIR, mode))

    def rmdir(self, folder: Path) -> None:
        if self._node(folder)[1].entries:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))
        self._change({self._at(folder): None})

    def names(self, folder: Path) -> list[str]:
        return sorted(self._node(folder)[1].entries)

    def stat(self, path: Path) -> Any:
        number, node = self._node(path)
        links = sum(number in self.nodes[n].entries.values() for n in self._folders(1))
        return SimpleNamespace(
            st_mode=node.kind | node.mode,
            st_ino=number,
            st_dev=1,
            st_nlink=links,
            st_size=len(node.data),
            st_mtime_ns=node.time,
        )

    def _folders(self, top: int) -> Iterator[int]:
        yield top
        for number in self.nodes[top].entries.values():
            if stat.S_ISDIR(self.nodes[number].kind):
                yield from self._folders(number)

    def read_link(self, path: Path) -> str:
        return self._node(path)[1].target

    def copy_attributes(self, source: Path, target: Path) -> None:
        self._node(target)[1].mode = self._node(source)[1].mode

    @contextlib.contextmanager
    def locked(self, path: Path) -> Iterator[None]:
        if not self.found(path):
            self.close(self.create(path))
        yield

    # --- content ----------------------------------------------------------------------------

    def open(self, path: Path, *, write: bool = False) -> int:
        return self._descriptor(self._node(path)[0])

    def create(self, path: Path, mode: int = 0o600) -> int:
        return self._descriptor(self._new(path, Node(stat.S_IFREG, mode)))

    def _descriptor(self, number: int) -> int:
        file = next(self._numbers)
        self.files[file] = number
        return file

    def close(self, file: int) -> None:
        del self.files[file]

    def pread(self, file: int, size: int, offset: int) -> bytes:
        return bytes(self.nodes[self.files[file]].data[offset : offset + size])

    def preadv(self, file: int, target: memoryview, offset: int) -> int:
        data = self.pread(file, len(target), offset)
        target[: len(data)] = data
        return len(data)

    def tensors(self, path: Path) -> Any:
        with self.opened(path) as file:
            return _Tensors(self.pread(file, self.stat(path).st_size, 0))

    def pwrite(self, file: int, data: memoryview, offset: int) -> int:
        self.before()
        node = self.nodes[self.files[file]]
        node.data.extend(bytes(max(0, offset + len(data) - len(node.data))))
        node.data[offset : offset + len(data)] = data
        written = len(data)
        while data:
            size = SECTOR - offset % SECTOR
            node.pending.append((offset, bytes(data[:size])))
            data, offset = data[size:], offset + size
        self._touch(node)
        return written

    def is_bound_elsewhere(self, folder: Path) -> bool:
        return False

    def is_open_here_alone(self, file: int) -> bool:
        return True

    def room(self, folder: Path) -> int:
        return 1 << 40

    def start_writing(self, file: int, size: int, offset: int) -> None:
        """The kernel may do it at any time anyway."""

    def clone(self, source: int, target: int) -> None:
        if not self.clones:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        self.write_all(target, memoryview(bytes(self.nodes[self.files[source]].data)), 0)

    def fsync(self, file: int) -> None:
        number = self.files[file]
        if self._flushes(number):
            node = self.nodes[number]
            node.durable, node.pending = bytes(node.data), []

    def fdatasync(self, file: int) -> None:
        self.fsync(file)

    def sync_folder(self, folder: Path) -> None:
        number = self._node(folder)[0]
        if not self._flushes(number):
            return
        for change in self.changes:
            change.waits.discard(number)
            if not change.waits:
                _apply(change, self.on_disk, self.settled)
        self.changes = [change for change in self.changes if change.waits]

    def _flushes(self, number: int) -> bool:
        self.before()
        names = (name for node in self.nodes.values() for name, n in node.entries.items()
                 if n == number)  # fmt: skip
        self.flushes.append(next(names, "?"))
        return len(self.flushes) - 1 not in self.without


class _Tensors:
    """What the product uses of safetensors' `safe_open`, of bytes."""

    def __init__(self, data: bytes):
        self._tensors = load(data)
        self._metadata = parse_metadata(data[: LENGTH.size + LENGTH.unpack(data[: LENGTH.size])[0]])

    def __enter__(self) -> _Tensors:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def metadata(self) -> dict[str, str] | None:
        return self._metadata

    def keys(self) -> list[str]:
        return list(self._tensors)

    def get_tensor(self, name: str) -> Any:
        return self._tensors[name]

    def get_slice(self, name: str) -> Any:
        return SimpleNamespace(get_shape=lambda: list(self._tensors[name].shape))


def _apply(change: Change, names: dict[Name, int], settled: dict[Name, int]) -> None:
    for name, number in change.names.items():
        # A later change of the same name may be on disk already.
        if settled.get(name, 0) > change.number:
            continue
        settled[name] = change.number
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _keeper(rng: random.Random) -> Callable[[list[Any]], list[Any]]:
    """Which of the things that are not on disk for sure are there nevertheless."""
    mode = rng.choice(("none", "all", "some", "some", "one", "all but one"))

    def keep(things: list[Any]) -> list[Any]:
        if not things or mode == "none":
            return []
        if mode == "all":
            return list(things)
        if mode == "some":
            return [thing for thing in things if rng.random() < 0.5]
        chosen = rng.randrange(len(things))
        return [t for at, t in enumerate(things) if (at == chosen) == (mode == "one")]

    return keep
