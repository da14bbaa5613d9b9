"""Processors of vision-language models on machines without torchvision.

transformers' own video processors need it. Qwen-VL's videos are processed here without.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...runtime.checks import is_int
from .registration import check_transformers
from .video_processor import FrameProcessor

# Processors whose videos are patches of frames, and whether their `size` is that of all frames.
_FRAMES_TOGETHER = {
    "Qwen2VLProcessor": False,
    "Qwen2_5_VLProcessor": False,
    "Qwen3VLProcessor": True,
}
_PARTS = ("image_processor", "tokenizer", "video_processor", "feature_extractor")


def load_processor(model: str | Path, **options: Any) -> Any:
    """A model's processor; without torchvision, one without transformers' video processor.

    transformers' video processors need torchvision. Without it the whole processor fails to load,
    even for images. This one takes images, and videos of Qwen2-VL, Qwen2.5-VL and Qwen3-VL, whose
    frames the caller has chosen, as `attention_map` does. Of other models, frames of a video can be
    given as several images.

    Args:
        model: a folder, or a name on the Hub.
        options: further keyword arguments of `from_pretrained`. Unless they say
            trust_remote_code=True, no Python code beside the processor runs.

    Raises:
        ImportError: transformers, or something else than a video processor, is missing.
        OSError: there is no such model.
    """
    check_transformers("load_processor")
    from transformers import AutoProcessor

    options.setdefault("trust_remote_code", False)  # None asks at the terminal

    try:
        return AutoProcessor.from_pretrained(model, **options)
    except (
        ImportError,
        ValueError,
    ) as error:  # a ValueError where a file names its video processor
        if "torchvision" not in str(error).lower():
            raise
    import transformers
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer
    from transformers.models.auto import processing_auto

    known_classes: Any = vars(processing_auto)["PROCESSOR_MAPPING_NAMES"]
    model_type = AutoConfig.from_pretrained(model, **options).model_type
    processor_class = getattr(transformers, known_classes[model_type])
    settings, _ = processor_class.get_processor_dict(model, **options)
    tokenizer = AutoTokenizer.from_pretrained(model, **options)
    settings.setdefault("chat_template", getattr(tokenizer, "chat_template", None))
    known = inspect.signature(processor_class.__init__).parameters
    video_settings = settings.get("video_processor") or _video_settings(model, options)
    return images_only(
        processor_class,
        AutoImageProcessor.from_pretrained(model, **options),
        tokenizer,
        video_settings=video_settings,
        **{k: v for k, v in settings.items() if k in known and k not in _PARTS},
    )


def _video_settings(model: str | Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint says of its video processor in a file of its own, if it has one."""
    from transformers.utils.hub import cached_file

    passed = ("cache_dir", "revision", "token", "local_files_only", "subfolder", "force_download")
    found = cached_file(
        model, "video_preprocessor_config.json",
        **{name: options[name] for name in passed if name in options},
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return {} if found is None else dict(json.loads(Path(found).read_text()))


def images_only(
    processor_class: type,
    image_processor: Any,
    tokenizer: Any,
    video_settings: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Any:
    """An object of `processor_class` without transformers' video processor.

    Where the class is one of Qwen-VL's, a `FrameProcessor` stands for it.

    Args:
        processor_class: a processor of transformers.
        image_processor, tokenizer: its parts.
        video_settings: of its video processor: `size`; default the image processor's.
        settings: its further arguments, such as chat_template.
    """
    stock: Any = processor_class

    class ImagesOnly(stock):
        made = False

        @classmethod
        def get_attributes(cls) -> list[str]:
            """The parts that exist, so that a made processor can be saved and shown."""
            parts: list[str] = super().get_attributes()
            return [part for part in parts if not (cls.made and part == "video_processor")]

        def save_pretrained(self, save_directory: Any, **options: Any) -> Any:
            written = super().save_pretrained(save_directory, **options)
            # With torchvision, the video processor is made from this file.
            self.image_processor.save_pretrained(save_directory)
            return written

        def to_dict(self, *args: Any, **options: Any) -> dict[str, Any]:
            made: dict[str, Any] = super().to_dict(*args, **options)
            made.pop("video_processor", None)
            return made

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor" and not hasattr(argument, "from_pretrained"):
                return type(argument)
            return super().check_argument_for_proper_class(argument_name, argument)

    ImagesOnly.__name__ = stock.__name__  # written into files by save_pretrained
    if "video_processor" in inspect.signature(stock.__init__).parameters:
        settings["video_processor"] = _frame_processor(stock, image_processor, video_settings or {})
    processor = ImagesOnly(image_processor=image_processor, tokenizer=tokenizer, **settings)
    ImagesOnly.made = True
    return processor


def _frame_processor(
    processor_class: type, image_processor: Any, settings: Mapping[str, Any]
) -> FrameProcessor | None:
    together = _FRAMES_TOGETHER.get(processor_class.__name__)
    if together is None or not hasattr(image_processor, "temporal_patch_size"):
        return None
    return FrameProcessor(image_processor, settings, all_frames=together)


def token_texts(tokenizer: Any, token_ids: list[int]) -> list[str]:
    """Each token as readable text, with its spaces and line breaks.

    A character that a byte-level tokenizer splits over n tokens appears at each of them, as "é 1/2"
    and "é 2/2". Bytes that form no character appear as "<0xC3>".

    Args:
        tokenizer: of transformers.
        token_ids: tokens of one text, in order.
    """
    for token_id in token_ids:
        if not is_int(token_id):
            raise TypeError(f"token_texts: token_ids must hold ints; got {token_id!r}")

    def decode(ids: list[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        )

    texts: list[str] = []
    start = 0
    while start < len(token_ids):
        # A character of UTF-8 is at most four bytes, hence at most four tokens.
        whole = next(
            (
                (length, text)
                for length in range(1, min(4, len(token_ids) - start) + 1)
                if "\ufffd" not in (text := decode(token_ids[start : start + length]))
            ),
            None,
        )
        if whole is None:
            texts.append(_bytes_of(tokenizer, token_ids[start]))
            start += 1
            continue
        length, text = whole
        if length == 1:
            texts.append(_with_space(tokenizer, token_ids[start], text))
        else:
            texts += [f"{text} {part}/{length}" for part in range(1, length + 1)]
        start += length
    return texts


def _with_space(tokenizer: Any, token_id: int, text: str) -> str:
    """The text of one token, with the leading space that SentencePiece's decoder drops."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    return (
        f" {text}" if isinstance(piece, str) and piece.startswith("▁") and text[:1] != " " else text
    )


def _bytes_of(tokenizer: Any, token_id: int) -> str:
    """The bytes of a token that is no text by itself."""
    piece = tokenizer.convert_ids_to_tokens(token_id)
    letters = _byte_letters()
    if all(letter in letters for letter in piece):
        return "".join(f"<0x{letters[letter]:02X}>" for letter in piece)
    return str(piece)  # SentencePiece writes <0xC3> itself


def _byte_letters() -> dict[str, int]:
    """GPT-2's letter for each byte: a printable byte is itself, the others start at U+0100."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(0x100 + number): byte for number, byte in enumerate(others)},
    }
