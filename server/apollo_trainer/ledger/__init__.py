"""What runs did, on disk: events in order for any number of readers, whatever crashes."""

from apollo_trainer.ledger.events import EventLog
from apollo_trainer.ledger.file import LedgerFile, transaction
from apollo_trainer.ledger.following import PAGE, require_next, require_reached, stopping
from apollo_trainer.ledger.journal import (
    FOLDER,
    JournalContents,
    journals_in,
    read_journal,
    remove_journal,
)
from apollo_trainer.ledger.ledger import Acceptance, Ledger, RunRow, digest_of, write_events
from apollo_trainer.ledger.retention import Retention
from apollo_trainer.ledger.writer import LedgerWriter

__all__ = [
    "FOLDER",
    "PAGE",
    "Acceptance",
    "EventLog",
    "JournalContents",
    "Ledger",
    "LedgerFile",
    "LedgerWriter",
    "Retention",
    "RunRow",
    "digest_of",
    "journals_in",
    "read_journal",
    "remove_journal",
    "require_next",
    "require_reached",
    "stopping",
    "transaction",
    "write_events",
]
