"""The command line of the trainer: `python -m ral sft | train | distill | eval | attention-map`."""

from .main import main

__all__ = ["main"]
