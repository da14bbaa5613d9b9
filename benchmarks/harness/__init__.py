"""What the sweeps share: inputs, contestants, the float64 gate, timing, memory, report, plot."""
