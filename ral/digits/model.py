"""A tiny Qwen2.5-VL with its own tokenizer and processor, made only from seeds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ral_kernels.integrations.transformers import images_only

from .puzzles import NAMES, SECONDS

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
# Standard deviation of the initial weights: at 0.02 the look-up is learnt late, at 0.1 later.
INIT = 0.04
SPECIAL = (PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_WORDS = (
    ["system\n", "user\n", "assistant\n", "Which", "When", "?", ","]
    + [f"{second}s" for second in range(SECONDS)]
    + [space + word for word in (*"0123456789", *NAMES) for space in ("", " ")]
    + [" digit", " is", " in", " the", " cell", " tile", " there", " a", " and", " which", " it"]
)


def make_tokenizer(words: Sequence[str] = ()) -> Any:
    """A byte-level BPE of about 440 tokens in which each word of the digits tasks is one token.

    Other text is encoded byte by byte.

    Args:
        words: further words of one token each; a space before a word belongs to it.

    Raises:
        ImportError: transformers is missing.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = _byte_letters()
    pieces = [
        *letters.values(),
        *("".join(letters[b] for b in word.encode()) for word in (*_WORDS, *words)),
    ]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    # Text that is not a word of the vocabulary is encoded byte by byte.
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(
                Regex(r"(system|user|assistant)\n| ?[A-Za-z0-9]+|\s+|[^\sA-Za-z0-9]"), "isolated"
            ),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(list(SPECIAL))
    # Tags of responses are not special tokens, so decoding keeps them.
    raw.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_processor(tokenizer: Any | None = None) -> Any:
    """transformers' own Qwen2.5-VL processor, for images; each 28 × 28 pixels are one token.

    Args:
        tokenizer: by default `make_tokenizer()`.
    """
    from transformers import Qwen2_5_VLProcessor
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    image_processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=28 * 28 * 4096)
    return images_only(
        Qwen2_5_VLProcessor, image_processor, tokenizer, chat_template=tokenizer.chat_template
    )


def make_model(
    *,
    num_layers: int = 2,
    hidden_size: int = 64,
    vision_depth: int = 1,
    vision_hidden_size: int = 48,
    seed: int = 0,
    attn_implementation: str = "sdpa",
    tokenizer: Any | None = None,
) -> Any:
    """A randomly initialised Qwen2.5-VL for the tokens of a tokenizer.

    Args:
        num_layers, hidden_size: of the language model, with heads of 16; hidden_size is a multiple
            of 32.
        vision_depth, vision_hidden_size: of the vision tower, with heads of 16.
        seed: of the weights; torch's own generator is left as it was.
        attn_implementation: as in transformers; "ral" works once ral_kernels is imported.
        tokenizer: by default `make_tokenizer()`.

    Returns:
        a `Qwen2_5_VLForConditionalGeneration` in float32, in evaluation mode.
    """
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = make_tokenizer() if tokenizer is None else tokenizer
    ids = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": hidden_size,
            "intermediate_size": 2 * hidden_size,
            "num_hidden_layers": num_layers,
            "num_attention_heads": hidden_size // 16,
            "num_key_value_heads": hidden_size // 32,
            "max_position_embeddings": 1 << 14,
            "initializer_range": INIT,
            "bos_token_id": None,
            "eos_token_id": ids(END),
            "pad_token_id": ids(PAD),
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
        },
        vision_config={
            "depth": vision_depth,
            "hidden_size": vision_hidden_size,
            "num_heads": vision_hidden_size // 16,
            "intermediate_size": 2 * vision_hidden_size,
            "out_hidden_size": hidden_size,
            "initializer_range": INIT,
            "fullatt_block_indexes": [vision_depth - 1],
        },
        image_token_id=ids(IMAGE),
        video_token_id=ids(VIDEO),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(
            config, attn_implementation=attn_implementation, dtype=torch.float32
        )
    model.generation_config.eos_token_id = ids(END)
    model.generation_config.pad_token_id = ids(PAD)
    # The model must not write placeholders of pictures.
    model.generation_config.suppress_tokens = [ids(token) for token in SPECIAL if token != END]
    return model.eval()


def save_start(folder: str | Path, model: Any | None = None, processor: Any | None = None) -> Path:
    """Write a checkpoint that `from_pretrained` and `load_processor` read.

    Args:
        folder: made where it is missing.
        model, processor: by default fresh ones.

    Returns:
        the folder.
    """
    folder = Path(folder)
    (make_model() if model is None else model).save_pretrained(folder)
    processor = make_processor() if processor is None else processor
    # Not processor.save_pretrained, which needs the files of the missing video processor.
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
    return folder


def _byte_letters() -> dict[int, str]:
    """GPT-2's letter for each byte: a printable byte is itself, the others start at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{byte: chr(byte) for byte in printable},
        **{byte: chr(0x100 + number) for number, byte in enumerate(others)},
    }
