"""The step on a CPU, in loops that numba compiles."""

from apollo_trainer.optim.cpu.stepper import fits, step_parameters

__all__ = ["fits", "step_parameters"]
