"""Ahead-of-time compilation of every Triton kernel, for GPUs that need not be there."""
