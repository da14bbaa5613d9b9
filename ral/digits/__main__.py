"""Train the bundled model of `load_pretrained` again: `python -m ral.digits [FILE]`."""

import sys
from pathlib import Path

import torch

from .pretrained import WEIGHTS, train_pretrained

if __name__ == "__main__":
    torch.set_num_threads(1)  # the fastest, and the weights depend on it
    train_pretrained(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / WEIGHTS)
