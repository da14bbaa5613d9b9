"""Data: rows with images or frames of videos for TRL, from JSON, parquet or `datasets`; prompts."""

from .errors import DataError
from .frames import natural_key, read_images, uniform_indices
from .loading import decode_batch, load_jsonl, load_rows
from .prompts import conversation, question_text, response
from .sft import completion, to_sft

__all__ = [
    "DataError",
    "completion",
    "conversation",
    "decode_batch",
    "load_jsonl",
    "load_rows",
    "natural_key",
    "question_text",
    "read_images",
    "response",
    "to_sft",
    "uniform_indices",
]
