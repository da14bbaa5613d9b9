#!/usr/bin/env bash
# Qwen2.5-VL-7B on verl with Reinforced Attention Learning, on 8 GPUs of 80 GB: rollouts by vLLM, FSDP2, packed rows.
#
#   examples/verl_qwen2_5_vl_7b_8_gpus.sh TRAIN.parquet TEST.parquet [SETTING=VALUE...]
#
# The data are verl's own parquet files. docs/verl.md says what to install. A control without RAL is the same run with
# actor_rollout_ref.actor.ral.coef=0.
set -euo pipefail
train=$1 test=$2
shift 2

settings=(
  hydra.searchpath=[pkg://ral] +engines=verl # the RAL term; its settings follow
  actor_rollout_ref.actor.ral.coef=1.0
  actor_rollout_ref.actor.ral.layers=-1
  actor_rollout_ref.actor.ral.snapshot_device=cpu # rollouts share the GPUs

  # In the first optimizer step on a batch the term is exactly zero: 4 mini-batches a batch.
  data.train_batch_size=256
  actor_rollout_ref.actor.ppo_mini_batch_size=64
  actor_rollout_ref.actor.ppo_epochs=1

  algorithm.adv_estimator=grpo
  actor_rollout_ref.rollout.n=8
  actor_rollout_ref.rollout.temperature=0.9
  actor_rollout_ref.actor.use_kl_loss=true
  actor_rollout_ref.actor.kl_loss_coef=0.04
  actor_rollout_ref.actor.optim.lr=1e-6

  actor_rollout_ref.model.path=Qwen/Qwen2.5-VL-7B-Instruct
  actor_rollout_ref.model.use_remove_padding=true
  actor_rollout_ref.model.enable_gradient_checkpointing=true
  actor_rollout_ref.actor.freeze_vision_tower=true
  actor_rollout_ref.actor.use_dynamic_bsz=true
  actor_rollout_ref.actor.ppo_max_token_len_per_gpu=16384
  actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=true
  actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=32768

  data.train_files="$train"
  data.val_files="$test"
  data.image_key=images
  data.max_prompt_length=8192
  data.max_response_length=1024
  actor_rollout_ref.rollout.name=vllm
  actor_rollout_ref.rollout.gpu_memory_utilization=0.6
  trainer.n_gpus_per_node=8
)
python -m verl.trainer.main_ppo "${settings[@]}" "$@"
