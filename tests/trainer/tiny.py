"""Tiny checkpoints, datasets and trainers for the tests of `ral`: a step takes 0.03–0.1 s.

path = tiny.checkpoint(tmp_path)
trainer = tiny.trainer(path, tmp_path, max_steps=4)
trainer.train()
losses = tiny.logged(trainer, "loss")
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image

from ral import RALConfig, RALTrainer
from ral_kernels.integrations.transformers import load_processor
from tests.integrations import models, tiny_checkpoint, tiny_processors

ROWS = 8  # prompts of a dataset

# Two iterations of two minibatches: four optimizer steps on a rollout batch of 8.
DEFAULTS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 2,
    "num_iterations": 2,
    "num_generations": 4,
    "max_completion_length": 8,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "attn_metrics_every": 1,
    "disable_tqdm": True,
}


def checkpoint(folder: Path, family: str = "qwen2_5_vl", **text_options: Any) -> Path:
    """A random model of about 300,000 weights with tokenizer, image processor, chat template.

    Args:
        folder: gets a folder named after the family; one that is there is taken as it is.
        family: "qwen2_5_vl" or "qwen3_vl".
        text_options: of its text configuration, such as `num_hidden_layers`.
    """
    path = Path(folder) / "-".join([family, *(f"{k}_{v}" for k, v in text_options.items())])
    if (path / "config.json").exists():
        return path
    if family == "qwen2_5_vl":
        return tiny_checkpoint.save(path, **text_options)
    if family != "qwen3_vl":
        raise ValueError(f"checkpoint: family must be qwen2_5_vl or qwen3_vl; got {family!r}")
    processor = tiny_processors.build(family)
    tokenizer = processor.tokenizer
    tokenizer.chat_template = tiny_checkpoint.CHAT_TEMPLATE
    model = _qwen3_vl(tokenizer, **text_options)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    processor.image_processor.save_pretrained(path)
    return path


def _qwen3_vl(tokenizer: Any, **text_options: Any) -> Any:
    import transformers

    ids = tokenizer.convert_tokens_to_ids
    config = models.FAMILIES["qwen3_vl"].config()
    text = config.get_text_config()
    text.vocab_size = len(tokenizer)
    text.max_position_embeddings = 1 << 16
    text.eos_token_id, text.pad_token_id = ids(tiny_checkpoint.END), ids(tiny_checkpoint.PAD)
    for name, value in text_options.items():
        setattr(text, name, value)
    config.image_token_id = ids(tiny_checkpoint.IMAGE)
    config.video_token_id = ids(tiny_checkpoint.VIDEO)
    config.vision_start_token_id = ids(tiny_checkpoint.VISION_START)
    config.vision_end_token_id = ids(tiny_checkpoint.VISION_END)
    config.tie_word_embeddings = False
    torch.manual_seed(0)
    model: Any = transformers.Qwen3VLForConditionalGeneration(config)
    model.generation_config.eos_token_id = ids(tiny_checkpoint.END)
    model.generation_config.pad_token_id = ids(tiny_checkpoint.PAD)
    model.generation_config.suppress_tokens = [
        ids(token) for token in tiny_checkpoint.SPECIAL if token != tiny_checkpoint.END
    ]
    return model.eval()


def dataset(rows: int = ROWS, images: int = 1, seed: int = 0) -> Dataset:
    """Questions about random pictures of two sizes, `images` each."""
    rng = np.random.default_rng(seed)

    def picture(index: int) -> Image.Image:
        height, width = ((56, 84), (84, 56))[index % 2]
        return Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8))

    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": f"What is in the picture {index}?"}],
                "images": [picture(index) for _ in range(images)],
                "solution": "ABCD"[index % 4],
                "problem_type": "multiple choice",
                "problem_id": str(index),
            }
            for index in range(rows)
        ]
    )


def reward(completions: list[Any], **columns: Any) -> list[float]:
    """A number from 0 to 6, of the completion alone; it differs within a group."""
    texts = [c if isinstance(c, str) else c[0]["content"] for c in completions]
    return [float(sum(map(ord, text)) % 7) for text in texts]


def lora(rank: int = 4) -> Any:
    """LoRA on the queries, keys and values of the text decoder, dropout 0."""
    from peft import LoraConfig

    return LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=["q_proj", "k_proj", "v_proj"],
        task_type="CAUSAL_LM",
    )  # fmt: skip


def trainer(
    path: str | Path,
    tmp_path: Path,
    *,
    trainer_class: type[RALTrainer] = RALTrainer,
    reward_funcs: Any = reward,
    train_dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    peft_config: Any = None,
    callbacks: list[Any] | None = None,
    teacher_model: Any = None,
    terms: Any = (),
    **config: Any,
) -> RALTrainer:
    """A trainer of the checkpoint at `path`, which writes into tmp_path/"out" by default.

    Args:
        path: of `checkpoint`.
        tmp_path: where output goes, unless `config` has output_dir.
        trainer_class: a subclass to make.
        config: settings of `RALConfig` other than `DEFAULTS`.
    """
    if not gc.get_freeze_count():
        # `train` collects garbage, 0.3 s over all that torch and transformers have imported.
        gc.collect()
        gc.freeze()
    settings = {"output_dir": str(Path(tmp_path) / "out"), **DEFAULTS, **config}
    return trainer_class(
        str(path),
        reward_funcs,
        RALConfig(**settings),
        train_dataset=dataset() if train_dataset is None else train_dataset,
        eval_dataset=eval_dataset,
        processing_class=load_processor(path),
        peft_config=peft_config,
        callbacks=callbacks,
        teacher_model=teacher_model,
        terms=terms,
    )


def logged(of: RALTrainer, name: str) -> list[float]:
    """Values of a metric in the order of the steps that logged it."""
    return [entry[name] for entry in of.state.log_history if name in entry]
