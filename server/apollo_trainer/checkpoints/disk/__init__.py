"""Files that survive a crash: flushed, swapped and digested, on whatever disk there is."""

from apollo_trainer.checkpoints.disk.digests import (
    RunningDigest,
    algorithm_of,
    digest,
    file_digest,
    hex_digest,
    in_blocks,
    matches,
    raw_bytes,
)
from apollo_trainer.checkpoints.disk.durable import (
    TEMPORARY,
    durable_bytes,
    durable_write,
    flush_file,
    flush_folder,
    staged,
    write_new,
)
from apollo_trainer.checkpoints.disk.file_ops import CANNOT_EXCHANGE, FILES, FileOps
from apollo_trainer.checkpoints.disk.mark import Mark
from apollo_trainer.checkpoints.disk.shard_header import (
    DTYPES,
    ShardHeader,
    TensorPlace,
    parse_metadata,
    whole_numbers,
)
from apollo_trainer.checkpoints.disk.store_folder import StoreFolder, own_bytes
from apollo_trainer.checkpoints.disk.tensor_file import (
    PIECE,
    digest_at,
    pieces_at,
    pieces_of,
    read_header,
    write_pieces,
    write_tensors,
)
from apollo_trainer.checkpoints.disk.threads import (
    background_threads,
    in_batches,
    spread,
    spread_by_size,
    threads_for,
)

__all__ = [
    "CANNOT_EXCHANGE",
    "DTYPES",
    "FILES",
    "PIECE",
    "TEMPORARY",
    "FileOps",
    "Mark",
    "RunningDigest",
    "ShardHeader",
    "StoreFolder",
    "TensorPlace",
    "algorithm_of",
    "background_threads",
    "digest",
    "digest_at",
    "durable_bytes",
    "durable_write",
    "file_digest",
    "flush_file",
    "flush_folder",
    "hex_digest",
    "in_batches",
    "in_blocks",
    "matches",
    "own_bytes",
    "parse_metadata",
    "pieces_at",
    "pieces_of",
    "raw_bytes",
    "read_header",
    "spread",
    "spread_by_size",
    "staged",
    "threads_for",
    "whole_numbers",
    "write_new",
    "write_pieces",
    "write_tensors",
]
