"""Kernels beside the torch references, with the same bits: C++ compiled once per machine, and numerics for Triton."""
