"""The layout of the Hub's `kernels`."""
