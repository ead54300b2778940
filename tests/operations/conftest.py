"""Operations in a ledger, without a model."""

from tests.trainers import open_books

__all__ = ["open_books"]
