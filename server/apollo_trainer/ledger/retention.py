"""Removes old events from the ledger, by age and by size, a little at a time."""

from __future__ import annotations

import sqlite3
import time
from dataclasses import dataclass

from apollo_trainer.ledger.file import transaction
from apollo_trainer.ledger.ledger import ENDED
from apollo_trainer.ledger.operations import prune_operations

# Each pass is one short transaction: an event's commit waits behind it.
RUNS_A_PASS = 16
EVENTS_A_PASS = 2000
PAGES_A_PASS = 256
# A run's row outlives its events, so that its request id is still known; some 300 bytes each.
KEPT_RUNS = 100_000


@dataclass(frozen=True)
class Retention:
    """How long and how much is kept.

    Attributes:
        seconds: events and specs of runs that ended longer ago are removed, and operations.
        bytes: the most that the ledger's file may use; the oldest ended runs are removed first,
            then the oldest events of runs that are still at work.
    """

    seconds: float
    bytes: int

    def apply(self, connection: sqlite3.Connection) -> bool:
        """Makes one pass, of some milliseconds; returns whether another one has work to do.

        The ledger's thread. Raises sqlite3.Error.
        """
        before = time.time_ns() - int(self.seconds * 1e9)
        with transaction(connection):
            more = self._prune(connection, before)
            more = prune_operations(connection, before) or more
        # Gives pages back to the disk; a whole VACUUM would lock the file for its length. A cursor
        # would take the first step of this, which is one page.
        connection.executescript(f"PRAGMA incremental_vacuum({PAGES_A_PASS})")
        return more or _pragma(connection, "freelist_count") > PAGES_A_PASS

    def _prune(self, connection: sqlite3.Connection, before: int) -> bool:
        old = _ended(connection, "ended < ?", before)
        if not old and _used_bytes(connection) > self.bytes:
            # The newest one is spared: its reader may be on the way.
            old = _ended(connection, "1")[:-1]
            if not old:
                return _prune_live(connection)
        for number in old:
            _prune_run(connection, number)
        connection.execute(
            "DELETE FROM runs WHERE number <= (SELECT MAX(number) FROM runs) - ? "
            "AND number NOT IN (SELECT number FROM specs)",
            (KEPT_RUNS,),
        )
        connection.execute("DELETE FROM labels WHERE number < (SELECT MIN(number) FROM runs)")
        return bool(old)


def _ended(connection: sqlite3.Connection, where: str, *values: int) -> list[int]:
    """Returns the numbers of the oldest ended runs that still have their spec."""
    places = ", ".join("?" * len(ENDED))
    found = connection.execute(
        f"SELECT number FROM specs JOIN runs USING (number) WHERE state IN ({places}) AND {where} "
        "ORDER BY number LIMIT ?",
        (*ENDED, *values, RUNS_A_PASS + 1),
    )
    return [number for (number,) in found]


def _prune_run(connection: sqlite3.Connection, number: int) -> None:
    """Removes a part of a run's events, and its spec with the last of them."""
    gone = connection.execute(
        "DELETE FROM events WHERE number = ?1 AND sequence <= "
        "(SELECT MIN(sequence) FROM events WHERE number = ?1) + ?2 RETURNING revision",
        (number, EVENTS_A_PASS),
    ).fetchall()
    last = max((revision for (revision,) in gone), default=0)
    connection.execute("UPDATE pruned SET through = MAX(through, ?)", (last,))
    first = connection.execute(
        "SELECT MIN(sequence) FROM events WHERE number = ?", (number,)
    ).fetchone()[0]
    if first is not None:
        connection.execute(
            "UPDATE runs SET pruned_through = ? WHERE number = ?", (first - 1, number)
        )
        return
    connection.execute("DELETE FROM specs WHERE number = ?", (number,))
    connection.execute("UPDATE runs SET pruned_through = last_sequence WHERE number = ?", (number,))


def _prune_live(connection: sqlite3.Connection) -> bool:
    """Removes the oldest events of the run that has the most, when one alone is too large."""
    row = connection.execute(
        "SELECT number, last_sequence - pruned_through AS kept FROM runs "
        "WHERE kept > ? ORDER BY kept DESC LIMIT 1",
        (2 * EVENTS_A_PASS,),
    ).fetchone()
    if row is None:
        return False
    _prune_run(connection, row[0])
    return True


def _used_bytes(connection: sqlite3.Connection) -> int:
    pages = _pragma(connection, "page_count") - _pragma(connection, "freelist_count")
    return pages * _pragma(connection, "page_size")


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").fetchone()[0])
