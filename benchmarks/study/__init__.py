"""The study that `benchmarks.figure3` runs: arms, runs, evaluation, statistics, picture."""
