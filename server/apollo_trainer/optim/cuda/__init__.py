"""The fused step on CUDA, in Triton."""

from apollo_trainer.optim.cuda.kinds import Work, fits
from apollo_trainer.optim.cuda.stepper import FusedStepper, Prepared

__all__ = ["FusedStepper", "Prepared", "Work", "fits"]
