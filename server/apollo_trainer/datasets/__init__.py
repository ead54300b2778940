"""Samples on disk, for runs that name them: brought once, read when a run's turn has come."""

from apollo_trainer.datasets.file_format import StoredSamples
from apollo_trainer.datasets.room import MAX_DATASETS
from apollo_trainer.datasets.store import FOLDER, DatasetStore, place
from apollo_trainer.datasets.upload import Upload

__all__ = ["FOLDER", "MAX_DATASETS", "DatasetStore", "StoredSamples", "Upload", "place"]
