"""Data: JSON lines with images or frames of videos as rows for TRL, and what prompts say."""

from .errors import DataError
from .frames import natural_key, read_images, uniform_indices
from .jsonl import decode_batch, load_jsonl
from .prompts import conversation, question_text, response
from .sft import completion, to_sft

__all__ = [
    "DataError",
    "completion",
    "conversation",
    "decode_batch",
    "load_jsonl",
    "natural_key",
    "question_text",
    "read_images",
    "response",
    "to_sft",
    "uniform_indices",
]
