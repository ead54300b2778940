"""A trainer without its services, and its books."""

from tests.trainers import all_events, attached, kinds, open_books, start_trainer

__all__ = ["all_events", "attached", "kinds", "open_books", "start_trainer"]
