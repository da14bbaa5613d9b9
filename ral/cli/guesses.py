"""Other names of settings: former ones, and those that people bring from other trainers."""

from __future__ import annotations

from collections.abc import Container

RENAMED = {"reward": "rewards"}  # still read under its old name

# How it is called here, and what people write.
WRITTEN = {
    "learning_rate": "lr",
    "lr_scheduler_type": "lr_scheduler scheduler",
    "gradient_accumulation_steps": "grad_accum grad_accumulation grad_accum_steps "
    "gradient_accumulation accumulation_steps accumulate_grad_batches",
    "per_device_train_batch_size": "batch_size bs train_batch_size micro_batch_size "
    "per_device_batch_size",
    "batch_size": "bs per_device_train_batch_size per_device_eval_batch_size eval_batch_size",
    "num_train_epochs": "epochs num_epochs epoch total_epochs",
    "max_steps": "steps num_steps train_steps total_steps iterations",
    "max_grad_norm": "grad_clip clip_grad gradient_clipping max_norm",
    "gradient_checkpointing": "grad_checkpointing checkpointing",
    "warmup_steps": "warmup num_warmup_steps",
    "optim": "optimizer",
    "num_generations": "group_size num_rollouts rollouts n rollout_n",
    "max_completion_length": "max_tokens max_new_tokens response_length max_response_length",
    "max_new_tokens": "max_tokens max_completion_length response_length max_response_length",
    "beta": "kl kl_coef kl_beta kl_loss_coef",
    "epsilon": "clip clip_ratio cliprange clip_range",
    "attn_coef": "ral_coef lambda attn_lambda attention_coef lambda_attn",
    "attn_layers": "layer layers attn_layer",
    "router_coef": "moe_coef router_lambda lambda_router",
    "use_vllm": "vllm",
    "model": "model_name model_name_or_path model_path",
    "teacher_model": "teacher teacher_model_name_or_path",
    "data": "dataset dataset_name dataset_path train_data train_file data_path jsonl",
    "data_split": "split dataset_split dataset_train_split dataset_test_split",
    "data_config": "dataset_config",
    "image_root": "image_folder image_dir images_dir",
    "max_frames": "frames num_frames nframes",
    "frames": "max_frames num_frames nframes",
    "rewards": "reward_funcs reward_func reward_fn reward_function reward_functions",
    "output_dir": "output out out_dir save_dir",
    "out": "output output_dir",
    "logging_steps": "log_every log_steps",
    "save_steps": "save_every",
    "lora_rank": "lora_r rank lora",
    "freeze_vision": "freeze_vit freeze_vision_tower freeze_vision_modules",
}


def meant(guess: str, known: Container[str]) -> list[str]:
    """The settings of a command that a name from elsewhere may mean."""
    return [
        name
        for name, written in WRITTEN.items()
        if name in known and guess.lower() in written.split()
    ]
