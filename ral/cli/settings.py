"""Our settings of the commands. The commands also take those of TRL and transformers."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from ..rewards import ACCURACY_WEIGHT, FORMAT_WEIGHT, STYLES

DTYPES = ("auto", "float32", "bfloat16", "float16")
DIGITS_EVAL_ROWS = 500
DIGITS = "digits"  # the bundled model, and the prefix of the bundled data
_DATA = (
    "A file of JSON lines, a JSON array, a parquet file, a folder of `datasets`, OWNER/NAME of a "
    "dataset on the Hub, or the bundled digits:cell, digits:timestamp, digits:chain or "
    "digits:chain_cells."
)
_ROOT = "Folder that paths in the data are relative to; default the data's own."
_FPS = "Frames a second of a video file, as far as {0} allows; default {0} of any video."


def _setting(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


def _check(name: str, value: object, ok: bool, wanted: str) -> None:
    if not ok:
        raise ValueError(f"{name} must be {wanted}; got {value!r}")


@dataclass
class ModelSettings:
    """The trained model, and how its weights are stored."""

    title = "model"
    model: str | None = _setting(
        None,
        "Folder of a model, its name on the Hub, or 'digits': a tiny model that is made here by "
        "supervised fine-tuning.",
    )
    attn_implementation: str | None = _setting(
        None, "Attention of the model: sdpa, flash_attention_2, ral, ...; default transformers'."
    )
    dtype: str | None = _setting(
        None,
        "Dtype of the weights: auto (the checkpoint's), float32, bfloat16 or float16; default "
        "float32, in which small updates are not rounded away, and bfloat16 under LoRA on a GPU "
        "that has it. bf16 sets the dtype of the computation.",
    )
    freeze_vision: bool = _setting(
        True, "Leave the vision encoder and its projector as they are, as in the paper."
    )
    min_pixels: int | None = _setting(
        None, "Images below this many pixels are enlarged; default the processor's."
    )
    max_pixels: int | None = _setting(
        None, "Images above this many pixels are shrunk; default the processor's."
    )
    lora_rank: int = _setting(0, "Rank of LoRA adapters; 0 trains the weights themselves.")
    lora_alpha: int | None = _setting(None, "α of LoRA; default twice the rank.")
    lora_dropout: float = _setting(0.0, "Dropout of LoRA; above 0 it adds noise to the old policy.")
    lora_targets: list[str] = field(
        default_factory=lambda: [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        metadata={
            "help": "Linear layers that get LoRA, by the end of their names; layers of a frozen "
            "vision encoder get none."
        },
    )

    def __post_init__(self) -> None:
        _check("dtype", self.dtype, self.dtype in (None, *DTYPES), f"one of {', '.join(DTYPES)}")
        _check("lora_rank", self.lora_rank, self.lora_rank >= 0, ">= 0")
        _check("lora_dropout", self.lora_dropout, 0 <= self.lora_dropout < 1, "in [0, 1)")
        _check("lora_targets", self.lora_targets, bool(self.lora_targets), "a list of names")
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            _check(name, value, value is None or value >= 1, ">= 1")


@dataclass
class TeacherSettings:
    """The teacher of On-Policy Attention Distillation."""

    title = "teacher"
    teacher_model: str | None = _setting(
        None,
        "Folder or name of the model to distil from, for distill_* > 0 or attn_reference=teacher; "
        "'digits': a bundled model whose demonstrations were all right.",
    )


@dataclass
class DataSettings:
    """The training data."""

    title = "data"
    data: str | None = _setting(None, _DATA)
    data_config: str | None = _setting(None, "Configuration of a dataset on the Hub.")
    data_split: str = _setting("train", "Split of a dataset.")
    style: str = _setting(
        "think",
        "'think': <think>…</think><answer>…</answer>; 'direct': <answer>…</answer>, RAL-zero.",
    )
    image_root: str | None = _setting(None, _ROOT)
    max_frames: int = _setting(16, "Frames of a video at most, evenly spread.")
    fps: float | None = _setting(None, _FPS.format("max_frames"))
    streaming: bool = _setting(False, "Read the file during training, not before.")
    skip_bad_rows: bool = _setting(
        False,
        "Skip invalid rows and rows with broken images, with a warning. All images are decoded for "
        "it, before training unless streaming.",
    )
    eval_data: str | None = _setting(
        None,
        "Data to evaluate in during training, in the form of data. train answers greedily, once a "
        "row, as far as eval_temperature and num_generations_eval are not given.",
    )
    eval_split: str = _setting("test", "Split of eval_data, where that is a dataset.")
    eval_rows: int = _setting(0, "Rows of eval_data at most; 0 = all of a file, or 500 of digits.")
    digits_rows: int = _setting(4096, "Rows of digits: data.")
    digits_extent: list[int] = field(
        default_factory=lambda: [8],
        metadata={
            "help": "Frames of a row of digits:timestamp or digits:chain, or cells on a side in "
            "digits:cell or digits:chain_cells. Of several values each row takes one."
        },
    )

    def __post_init__(self) -> None:
        _check("style", self.style, self.style in STYLES, f"one of {', '.join(STYLES)}")
        _check("max_frames", self.max_frames, self.max_frames >= 1, ">= 1")
        _check("eval_rows", self.eval_rows, self.eval_rows >= 0, ">= 0")
        _check("fps", self.fps, self.fps is None or 0 < self.fps < math.inf, "> 0")
        _check("digits_rows", self.digits_rows, self.digits_rows >= 1, ">= 1")
        ok = bool(self.digits_extent) and all(n >= 1 for n in self.digits_extent)
        _check("digits_extent", self.digits_extent, ok, "a list of numbers >= 1")


@dataclass
class RewardSettings:
    """The reward."""

    title = "rewards"
    accuracy_weight: float = _setting(ACCURACY_WEIGHT, "Weight of a right answer.")
    format_weight: float = _setting(FORMAT_WEIGHT, "Weight of the form that `style` asks for.")
    rewards: list[str] | None = field(
        default=None,
        metadata={
            "help": "Rewards in place of both, each with its weight (1 if there is none): "
            "accuracy:1,format:0.5,file.py:name:2. `accuracy`, `format`, or functions with TRL's "
            "signature: file.py:name or package.module:name."
        },
    )


@dataclass
class TermSettings:
    """Terms of the loss besides those of eq. (3) and (4)."""

    title = "terms"
    terms: list[str] | None = field(
        default=None,
        metadata={
            "help": "Classes of ral.Term, each with its coefficient (1 if there is none): "
            "file.py:Name:0.5 or package.module:Name."
        },
    )


@dataclass
class RunSettings:
    """Resuming, threads, and output."""

    title = "run"
    resume: str | bool = _setting(
        False, "Resume from the last complete checkpoint in output_dir (true), or from this folder."
    )
    threads: int | None = _setting(
        None, "Threads of torch on the CPU; default torch's. Tiny models are fastest with one."
    )
    verbose: bool = _setting(
        False, "Print everything that TRL logs, and tracebacks of errors in settings and data."
    )

    def __post_init__(self) -> None:
        _check("threads", self.threads, self.threads is None or self.threads >= 1, ">= 1")


@dataclass
class EvalSettings:
    """Accuracy over frames and resolution."""

    title = "eval"
    model: str | None = _setting(None, "Folder of a model, or its name on the Hub.")
    data: str | None = _setting(None, _DATA)
    data_config: str | None = _setting(None, "Configuration of a dataset on the Hub.")
    data_split: str = _setting("train", "Split of a dataset, such as test.")
    style: str = _setting("think", "Form of the answers: 'think' or 'direct'.")
    image_root: str | None = _setting(None, _ROOT)
    rows: int = _setting(0, "Rows at most; 0 = all of a file, or 500 of digits.")
    frames: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Numbers of frames; default 4,8,16,32,64 for digits:timestamp, 8,16,32,64 for "
            "digits:chain, 16 for videos."
        },
    )
    fps: float | None = _setting(None, _FPS.format("frames"))
    grids: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Cells on a side; default 2,3,4,6,8 for digits:cell, 3,4,6,8 for "
            "digits:chain_cells."
        },
    )
    max_pixels: list[int] = field(
        default_factory=list,
        metadata={
            "help": "Resolutions for data other than digits: pixels of an image at most; default "
            "the processor's."
        },
    )
    batch_size: int = _setting(16, "Rows in a batch.")
    max_new_tokens: int | None = _setting(
        None, "Tokens of a response at most; default 768, or 24 for digits."
    )
    attn_implementation: str | None = _setting(
        None, "Attention of the model; default transformers'."
    )
    dtype: str | None = _setting(
        None, "Dtype of the weights; default bfloat16 on a GPU that has it, else float32."
    )
    device: str | None = _setting(None, "cpu, cuda, ...; default cuda if there is a GPU.")
    trust_remote_code: bool = _setting(False, "Run Python code that comes with the model.")
    threads: int | None = _setting(
        None, "Threads of torch on the CPU; default torch's. Tiny models are fastest with one."
    )
    seed: int = _setting(0, "Seed that selects the rows of digits.")
    out: str | None = _setting(None, "JSON file of the results; default in the model's folder.")
    plot: str | None = _setting(None, "File for a picture of the table, such as accuracy.png.")

    def __post_init__(self) -> None:
        _check("style", self.style, self.style in STYLES, f"one of {', '.join(STYLES)}")
        _check("dtype", self.dtype, self.dtype in (None, *DTYPES), f"one of {', '.join(DTYPES)}")
        _check("rows", self.rows, self.rows >= 0, ">= 0")
        _check("fps", self.fps, self.fps is None or 0 < self.fps < math.inf, "> 0")
        _check("batch_size", self.batch_size, self.batch_size >= 1, ">= 1")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, ">= 1")
        for name in ("frames", "grids", "max_pixels"):
            values = getattr(self, name)
            _check(name, values, all(n >= 1 for n in values), "a list of numbers >= 1")


@dataclass
class DemoSettings:
    """The first picture."""

    title = "demo"
    out: str = _setting("ral-demo", "Folder for the pictures.")
    frames: int = _setting(8, "Frames of the puzzle, 1 to 100.")
    seed: int = _setting(7, "Which puzzle.")
    threads: int | None = _setting(None, "Threads of torch on the CPU; default torch's.")

    def __post_init__(self) -> None:
        _check("frames", self.frames, 1 <= self.frames <= 100, "within 1..100")
        _check("seed", self.seed, self.seed >= 0, ">= 0")
        _check("threads", self.threads, self.threads is None or self.threads >= 1, ">= 1")
