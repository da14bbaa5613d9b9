"""A small problem, and which tests run where there is no TRL, which needs Python 3.11."""

from __future__ import annotations

import sys

import pytest
import torch

from benchmarks.harness.inputs import Heads
from benchmarks.problems.attention.problem import AttentionProblem, random_problem

HEADS = Heads(4, 2, 32)

# By version, and not by what is installed: where TRL should be and is not, these tests fail.
collect_ignore = ["test_figure3.py", "test_train_overhead.py"] if sys.version_info < (3, 11) else []


@pytest.fixture
def problem() -> AttentionProblem:
    return random_problem([40, 3, 25], HEADS, torch.float32, "cpu")
