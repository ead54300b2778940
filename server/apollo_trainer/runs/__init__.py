"""Training runs: queued, executed and saved."""

from apollo_trainer.runs.needed_datasets import NeededDatasets
from apollo_trainer.runs.queue import RunQueue
from apollo_trainer.runs.run import PreparedRun, prepare_run
from apollo_trainer.runs.scoring import SCORING_THREADS, Scoring

__all__ = ["SCORING_THREADS", "NeededDatasets", "PreparedRun", "RunQueue", "Scoring", "prepare_run"]
