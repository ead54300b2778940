"""The ledger's file: SQLite in WAL mode, private, of a known version, and open in one server.

https://www.sqlite.org/wal.html; `synchronous=FULL` flushes the log at each commit.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from apollo_grpc.errors import FailedPrecondition

FILE_NAME = "ledger.sqlite"
BUSY_SECONDS = 10.0
# What the write-ahead log is cut to after a checkpoint; it grows without it and stays so.
MAX_LOG_BYTES = 4 * 2**20

# Each one leads from the version before: a new file takes all of them, an older one those it lacks.
_STEPS = (
    """
CREATE TABLE runs (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  run_id TEXT NOT NULL UNIQUE,
  request_id TEXT UNIQUE,
  digest BLOB NOT NULL,
  spec BLOB,
  spec_head BLOB NOT NULL,
  state INTEGER NOT NULL,
  created INTEGER NOT NULL,
  started INTEGER NOT NULL DEFAULT 0,
  ended INTEGER NOT NULL DEFAULT 0,
  steps_done INTEGER NOT NULL DEFAULT 0,
  steps_total INTEGER NOT NULL,
  optimizer_step INTEGER NOT NULL DEFAULT 0,
  epoch TEXT NOT NULL DEFAULT '',
  last_sequence INTEGER NOT NULL DEFAULT 0,
  pruned_through INTEGER NOT NULL DEFAULT 0,
  failure BLOB
);
CREATE INDEX runs_by_state ON runs (state, number);
CREATE TABLE events (
  number INTEGER NOT NULL,
  sequence INTEGER NOT NULL,
  event BLOB NOT NULL,
  PRIMARY KEY (number, sequence)
) WITHOUT ROWID;
""",
    # A revision is never given twice, also when its event is gone. Events of before get theirs in
    # the order of their runs.
    """
CREATE TABLE revised (
  revision INTEGER PRIMARY KEY AUTOINCREMENT,
  number INTEGER NOT NULL,
  sequence INTEGER NOT NULL,
  event BLOB NOT NULL,
  UNIQUE (number, sequence)
);
INSERT INTO revised (number, sequence, event)
  SELECT number, sequence, event FROM events ORDER BY number, sequence;
DROP TABLE events;
ALTER TABLE revised RENAME TO events;
CREATE TABLE pruned (through INTEGER NOT NULL);
INSERT INTO pruned VALUES (0);
CREATE TABLE specs (number INTEGER PRIMARY KEY, spec BLOB NOT NULL);
INSERT INTO specs SELECT number, spec FROM runs WHERE spec IS NOT NULL;
ALTER TABLE runs DROP COLUMN spec;
ALTER TABLE runs ADD COLUMN name TEXT NOT NULL DEFAULT '';
ALTER TABLE runs ADD COLUMN last_loss REAL;
ALTER TABLE runs ADD COLUMN weight_version INTEGER;
ALTER TABLE runs ADD COLUMN in_doubt INTEGER NOT NULL DEFAULT 0;
CREATE INDEX runs_by_name ON runs (name, number);
CREATE TABLE labels (
  label TEXT NOT NULL,
  value TEXT NOT NULL,
  number INTEGER NOT NULL,
  PRIMARY KEY (label, value, number)
) WITHOUT ROWID;
CREATE INDEX labels_by_run ON labels (number);
CREATE TABLE operations (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  operation_id TEXT NOT NULL UNIQUE,
  request_id TEXT UNIQUE,
  kind INTEGER NOT NULL,
  digest BLOB NOT NULL,
  created INTEGER NOT NULL,
  state INTEGER NOT NULL,
  started INTEGER NOT NULL,
  ended INTEGER NOT NULL,
  outcome BLOB NOT NULL
);
CREATE INDEX operations_by_end ON operations (ended);
""",
)
VERSION = len(_STEPS)


class LedgerFile:
    """The file, locked by this server until `close`.

    Args:
        folder: private to the user.

    Raises FailedPrecondition where the file is of a newer version, damaged, or locked by another
    server; it is left as it is.
    """

    def __init__(self, folder: Path):
        self.path = folder / FILE_NAME
        self._lock = _locked(folder / "ledger.lock")
        try:
            self.writer = self.connect()
            self._prepare()
        except BaseException as error:
            os.close(self._lock)
            if isinstance(error, sqlite3.Error):
                raise _refusal(self.path, error) from error
            raise

    def connect(self) -> sqlite3.Connection:
        """Opens a connection, which one thread at a time may use."""
        # SQLite gives its log and index the mode of the file itself.
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
        self.path.chmod(0o600)
        connection = sqlite3.connect(
            self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        connection.execute("PRAGMA synchronous = FULL")
        # What is deleted is gone from the file, not only out of use.
        connection.execute("PRAGMA secure_delete = ON")
        connection.execute(f"PRAGMA journal_size_limit = {MAX_LOG_BYTES}")
        return connection

    def _prepare(self) -> None:
        version = int(self.writer.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            raise FailedPrecondition(
                f"The ledger {self.path} was written by a newer training server (version "
                f"{version}; this one knows {VERSION}); it was left as it is. Start the newer "
                "server, or choose another state folder with APOLLO_STATE_DIR.",
                reason="LEDGER_NEWER",
            )
        if version == 0:
            # Only before the first table: afterwards it would take a whole VACUUM.
            self.writer.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self.writer.execute("PRAGMA journal_mode = WAL")
        if 0 < version < VERSION:
            # What was deleted by versions before this one is still in the free pages.
            self.writer.execute("VACUUM")
        if version < VERSION:
            steps = "".join(_STEPS[version:])
            self.writer.executescript(f"BEGIN;{steps}PRAGMA user_version = {VERSION};COMMIT;")
        found = self.writer.execute("PRAGMA quick_check(1)").fetchone()[0]
        if found != "ok":
            raise sqlite3.DatabaseError(found)

    def close(self) -> None:
        """Closes and unlocks the file; unlocks it also where the disk refuses to close it."""
        try:
            self.writer.close()
        finally:
            os.close(self._lock)


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commits at the end of the block; rolls back where anything raises, and raises that."""
    try:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("COMMIT")
    except BaseException:
        # SQLite may have rolled back itself; what refused must be raised, not that.
        with suppress(sqlite3.Error):
            if connection.in_transaction:
                connection.execute("ROLLBACK")
        raise


def _locked(path: Path) -> int:
    """Two servers on one ledger would each settle the other's run as interrupted."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(descriptor)
        raise FailedPrecondition(
            f"Another server already holds the ledger in {path.parent}. Stop it, or choose "
            "another state folder with APOLLO_STATE_DIR.",
            reason="LEDGER_TAKEN",
        ) from error
    return descriptor


def _refusal(path: Path, error: sqlite3.Error) -> FailedPrecondition:
    return FailedPrecondition(
        f"The ledger {path} cannot be used ({error}); it was left as it is, and no run is taken "
        "without one. Make room if the disk is full; if the file is damaged, move it away (with "
        "its -wal and -shm) to begin a new one: runs and their events are then forgotten, the "
        "weights and the Apollo state are not.",
        reason="LEDGER_DAMAGED",
    )
