"""What callers are told of a server and its model beside how these are."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import Counter
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from apollo_grpc.errors import ApolloError
from apollo_grpc.transport import MAX_MESSAGE_BYTES
from apollo_grpc.v1 import status_pb2 as pb
from apollo_trainer.config import Settings
from apollo_trainer.datasets import MAX_DATASETS
from apollo_trainer.engine.coherence import COHERENCE_MODES

if TYPE_CHECKING:
    from apollo_trainer.engine.owner import ModelOwner
    from apollo_trainer.engine.session import Session

log = logging.getLogger(__name__)
MIB = 2**20
LIBRARIES = ("torch", "transformers", "grpcio", "protobuf")
# What decides which tokens a text or a chat becomes.
TOKENIZER_FILES = (
    "tokenizer*", "tokenization_*.py", "vocab.*", "merges.txt", "special_tokens_map.json",
    "added_tokens.json", "spiece.model", "sentencepiece*.model", "*.tiktoken", "tekken.json",
    "chat_template*",
)  # fmt: skip


class ServerInfo:
    """Tells of one server, and of the model that its owner is attached to."""

    def __init__(self, owner: ModelOwner, settings: Settings):
        self._owner = owner
        self._server = pb.GetServerInfoResponse(
            server_version=version("apollo-grpc"),
            versions={name: version(name) for name in LIBRARIES},
            limits=pb.ServerLimits(
                samples=settings.max_samples,
                queued_runs=settings.max_queued_runs,
                queued_bytes=settings.max_queued_mebibytes * MIB,
                streams=settings.max_streams,
                watchers=settings.max_watchers,
                message_bytes=MAX_MESSAGE_BYTES,
                datasets=MAX_DATASETS,
                dataset_samples=settings.max_dataset_samples,
                dataset_bytes=settings.dataset_mebibytes * MIB,
            ),
        )

    def now(self) -> pb.GetServerInfoResponse:
        """All of it; without a model where none is attached.

        It waits for updates that are still encoded: any thread but an event loop's.
        """
        info = pb.GetServerInfoResponse()
        info.CopyFrom(self._server)
        try:
            session = self._owner.session()
        except ApolloError:
            return info
        info.model.CopyFrom(session.model_info)
        checkpoints = session.checkpoints
        info.model.undoable_updates = 0 if checkpoints.poison.why else len(checkpoints.ring)
        return info


def model_info(session: Session) -> pb.ModelInfo:
    """What stays as it is while a session lasts. It reads the tokenizer's files."""
    attachment, elements = session.attachment, Counter[str]()
    for parameter in attachment.parameters().values():
        elements[str(parameter.dtype).removeprefix("torch.")] += parameter.numel()
    ((dtype, _),) = elements.most_common(1)
    return pb.ModelInfo(
        directory=attachment.directory,
        architecture=type(attachment.model).__name__,
        vocabulary=session.limits.vocabulary,
        max_length=session.limits.max_tokens,
        dtype=dtype,
        parameters=elements.total(),
        tokenizer_digest=tokenizer_digest(Path(attachment.directory)),
        vllm_version=attachment.vllm_version,
        coherence_modes=COHERENCE_MODES,
    )


def tokenizer_digest(directory: Path) -> str:
    """That of what `sha256sum` says of the tokenizer's files, in the order of their names.

    Empty where there are none, or where one cannot be read.
    """
    whole = hashlib.sha256()
    try:
        files = [path for path in sorted(directory.iterdir()) if _is_tokenizers(path)]
        for path in files:
            with path.open("rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            whole.update(content.encode() + b"  " + os.fsencode(path.name) + b"\n")
    except OSError as error:
        log.warning("the tokenizer's files cannot be read: %s", error)
        return ""
    return whole.hexdigest() if files else ""


def _is_tokenizers(path: Path) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in TOKENIZER_FILES) and path.is_file()
