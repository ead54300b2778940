"""Kernels for passes on a GPU, in Triton: nothing imports them where it is missing."""
