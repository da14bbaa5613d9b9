#!/usr/bin/env bash
# Qwen2.5-VL-7B with Reinforced Attention Learning on 8 GPUs of 80 GB: supervised start, RAL, its control, evaluation.
#
#   examples/qwen2_5_vl_7b_8_gpus.sh COT.jsonl RL.jsonl TEST.jsonl [RUNS]
#
# COT.jsonl has worked answers (`process`), RL.jsonl and TEST.jsonl questions with solutions: ral/README.md has the
# format, and what a GPU holds. A stage that was stopped continues when the script is called again.
set -euo pipefail
cot=$1 rl=$2 test=$3 runs=${4:-runs}

config=$(python -c 'from importlib.resources import files; print(files("ral.launch") / "fsdp2.yaml")')
launch=(accelerate launch --config_file "$config" --num_processes 8 -m ral)
rollouts=(use_vllm=true attn_implementation=flash_attention_2) # vLLM shares the GPUs with the trainer

# 1. Think and answer, as the paper's supervised stage teaches it.
"${launch[@]}" sft --preset paper-sft data="$cot" output_dir="$runs/sft" resume=true

# 2. GRPO + RAL, λ = 1 on the last layer; and the same without RAL, or nothing can be said of it.
"${launch[@]}" train --preset paper model="$runs/sft" data="$rl" output_dir="$runs/ral" resume=true "${rollouts[@]}"
"${launch[@]}" train --preset paper model="$runs/sft" data="$rl" output_dir="$runs/grpo" resume=true "${rollouts[@]}" \
  attn_coef=0

# 3. Accuracy over frames, where the paper's Figure 3 sees the gain grow.
for run in sft grpo ral; do
  python -m ral eval model="$runs/$run" data="$test" frames=4,16,64 out="$runs/$run.json"
done
