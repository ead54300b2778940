"""The step on a CPU, in loops that numba compiles."""

from apollo_trainer.optim.cpu.stepper import FEW_WEIGHTS, fits, step_parameters, throwaway

__all__ = ["FEW_WEIGHTS", "fits", "step_parameters", "throwaway"]
