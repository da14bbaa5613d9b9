"""The study behind figure3.py: arms, runs, evaluation, statistics, picture."""
