"""A tiny random Qwen2.5-VL as a folder that `from_pretrained` and `--model PATH` read.

    python -m tests.integrations.tiny_checkpoint FOLDER

Its tokenizer is a byte-level BPE trained on a few sentences, so that words are tokens, and any
text, in any script, can be written. The weights are noise: so are its answers and its maps.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

SENTENCES = [
    "A cup of coffee stands on a wooden table, with a spoon beside it.",
    "The astronaut smiles in front of a flag and a space shuttle.",
    "The cat looks into the camera; its eyes are green and its fur is brown.",
    "What is in the picture? Where does the model look when it writes a word?",
    "In the first frame the camera is on the left, in the last frame on the right.",
]
PAD, END, IMAGE, VIDEO = "<|endoftext|>", "<|im_end|>", "<|image_pad|>", "<|video_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
SPECIAL = [PAD, "<|im_start|>", END, VISION_START, VISION_END, IMAGE, VIDEO]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MAX_PIXELS = 28 * 28 * 160  # 160 visual tokens a picture


def tokenizer(special: list[str] = SPECIAL, **tokens: str) -> Any:
    """A byte-level BPE of about 500 tokens; `tokens` are further named special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=[*special, *tokens.values()],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=dict(tokens),
        clean_up_tokenization_spaces=False,
    )


def image_processor(max_pixels: int = MAX_PIXELS) -> Any:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    return Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=max_pixels)


def model(vocabulary: Any, **text_options: Any) -> Any:
    """A random Qwen2.5-VL of about 300,000 weights for the token ids of `vocabulary`."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    ids = vocabulary.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(vocabulary),
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1 << 16,
            "bos_token_id": None,
            "eos_token_id": ids(END),
            "pad_token_id": ids(PAD),
            "initializer_range": 0.15,  # attention far from uniform
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 3, 3],
            },
            **text_options,
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 2,
            "intermediate_size": 48,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [1],
            "initializer_range": 0.15,
        },
        image_token_id=ids(IMAGE),
        video_token_id=ids(VIDEO),
        vision_start_token_id=ids(VISION_START),
        vision_end_token_id=ids(VISION_END),
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    made: Any = Qwen2_5_VLForConditionalGeneration(config)
    made.generation_config.eos_token_id = ids(END)
    made.generation_config.pad_token_id = ids(PAD)
    # A random model would write placeholders for pictures that are not there.
    made.generation_config.suppress_tokens = [ids(token) for token in SPECIAL if token != END]
    return made.eval()


def save(folder: Path, **text_options: Any) -> Path:
    """Write model, tokenizer, image processor and chat template into `folder`."""
    vocabulary = tokenizer()
    vocabulary.chat_template = CHAT_TEMPLATE
    model(vocabulary, **text_options).save_pretrained(folder)
    vocabulary.save_pretrained(folder)
    image_processor().save_pretrained(folder)
    return folder


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m tests.integrations.tiny_checkpoint FOLDER")
    print(save(Path(sys.argv[1])))
