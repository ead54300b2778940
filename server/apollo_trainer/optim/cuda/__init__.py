"""The fused step on CUDA, in Triton."""

from apollo_trainer.optim.cuda.stepper import FusedStepper, fits
from apollo_trainer.optim.cuda.tables import Work

__all__ = ["FusedStepper", "Work", "fits"]
