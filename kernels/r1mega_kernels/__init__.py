"""Kernels and solvers of r1mega, one folder each: reference, kernel, test and benchmark side by side."""
