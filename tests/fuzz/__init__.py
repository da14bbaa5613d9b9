"""Random calls, valid and malformed, of the CPU backend against the reference backend."""
