"""Rewards with TRL's signature: the form of a response and the accuracy of its answer."""

from .accuracy import PROBLEM_TYPES, accuracy_reward
from .choice import parse_choice
from .combined import (
    ACCURACY_WEIGHT,
    FORMAT_WEIGHT,
    REWARD_WEIGHTS,
    combined_reward,
    paper_reward,
)
from .numbers import Number, parse_number
from .tags import (
    STYLES,
    bare_solution,
    completion_text,
    direct_format_reward,
    find_answer,
    format_reward,
)
from .text import rouge, word_error_rate

__all__ = [
    "ACCURACY_WEIGHT",
    "FORMAT_WEIGHT",
    "PROBLEM_TYPES",
    "REWARD_WEIGHTS",
    "STYLES",
    "Number",
    "accuracy_reward",
    "bare_solution",
    "combined_reward",
    "completion_text",
    "direct_format_reward",
    "find_answer",
    "format_reward",
    "paper_reward",
    "parse_choice",
    "parse_number",
    "rouge",
    "word_error_rate",
]
