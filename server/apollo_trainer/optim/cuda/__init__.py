"""The fused step on CUDA, in Triton."""

from apollo_trainer.optim.cuda.kinds import Work
from apollo_trainer.optim.cuda.stepper import FusedStepper, Prepared, fits

__all__ = ["FusedStepper", "Prepared", "Work", "fits"]
