"""What runs did, and operations, on disk: for any number of readers, whatever crashes."""

from apollo_trainer.ledger.entries import Acceptance, Deletion, write_events
from apollo_trainer.ledger.events import EventLog
from apollo_trainer.ledger.feed import Feed
from apollo_trainer.ledger.file import LedgerFile, transaction
from apollo_trainer.ledger.following import (
    PAGE,
    Readers,
    require_next,
    require_reached,
    stopping,
)
from apollo_trainer.ledger.journal import (
    FOLDER,
    JournalContents,
    journals_in,
    read_journal,
    remove_journal,
)
from apollo_trainer.ledger.ledger import ENDED, Choice, Ledger, RunRow, digest_of
from apollo_trainer.ledger.operations import (
    KeptOperations,
    OperationChange,
    OperationRow,
    end_interrupted,
)
from apollo_trainer.ledger.retention import Retention
from apollo_trainer.ledger.writer import LedgerWriter

__all__ = [
    "ENDED",
    "FOLDER",
    "PAGE",
    "Acceptance",
    "Choice",
    "Deletion",
    "EventLog",
    "Feed",
    "JournalContents",
    "KeptOperations",
    "Ledger",
    "LedgerFile",
    "LedgerWriter",
    "OperationChange",
    "OperationRow",
    "Readers",
    "Retention",
    "RunRow",
    "digest_of",
    "end_interrupted",
    "journals_in",
    "read_journal",
    "remove_journal",
    "require_next",
    "require_reached",
    "stopping",
    "transaction",
    "write_events",
]
