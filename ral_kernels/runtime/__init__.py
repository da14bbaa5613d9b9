"""What ops stand on: the choice of a backend, checks, compiled libraries, Triton's launches."""
