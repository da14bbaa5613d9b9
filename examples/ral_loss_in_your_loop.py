"""The RAL loss in a plain PyTorch loop, without a trainer: real digits, a real reward, offline.

    python examples/ral_loss_in_your_loop.py

The bundled model answers questions about 32 frames, in groups as in GRPO. A right answer pulls the
policy towards where it looked for it; a wrong one pushes it away. Put your model, rows and reward
in the place of `load_pretrained`, `make_dataset` and `is_right`.
"""

import torch

import ral_kernels as rk
from ral.digits import load_pretrained
from ral.digits.tasks import make_dataset

PROMPTS, GROUP = 4, 8  # of a rollout batch, and answers to each
INNER_STEPS = 3  # on the same answers; in the first of them the RAL loss is exactly zero
RAL_WEIGHT = 5.0  # λ

torch.manual_seed(0)
model, processor = load_pretrained()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
rows = make_dataset("timestamp", size=2 * PROMPTS, frames=32)


def is_right(text: str, solution: str) -> float:
    """The reward of an answer such as <think>37s</think><answer>4</answer>."""
    return float(f"<answer>{solution}</answer>" in text)


def prepare(batch: list[dict]) -> dict[str, torch.Tensor]:
    """What the model takes: each prompt GROUP times, padded on the left."""
    texts = [
        processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
        for row in batch
        for _ in range(GROUP)
    ]
    images = [row["images"] for row in batch for _ in range(GROUP)]
    return dict(
        processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
    )


for number in range(len(rows) // PROMPTS):
    batch = [rows[number * PROMPTS + place] for place in range(PROMPTS)]
    inputs = prepare(batch)
    prompt_length = inputs["input_ids"].shape[1]

    # 1. The policy answers.
    model.eval()
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=True, temperature=1.2)
    answers = tokens[:, prompt_length:]
    ends = (answers == processor.tokenizer.eos_token_id).int()
    mask = ends.cumsum(1) - ends == 0  # up to the end of the turn, which counts

    # 2. Rewards, and advantages within each group.
    texts = processor.tokenizer.batch_decode(answers)
    solutions = [row["solution"] for row in batch for _ in range(GROUP)]
    rewards = torch.tensor([is_right(*pair) for pair in zip(texts, solutions, strict=True)])
    groups = rewards.view(PROMPTS, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1)

    # 3. Several steps on these answers.
    inputs["input_ids"] = tokens
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0)):  # of an answer's token
        inputs[name] = torch.cat([inputs[name], torch.full_like(answers, value)], dim=1)
    queries = slice(prompt_length - 1, -1)  # those that predict the answer's tokens
    model.train()
    for step in range(INNER_STEPS):
        with rk.capture(model, layers=-1, rows=queries) as captured:
            logits = model(**inputs, use_cache=False).logits[:, queries]
        log_p = logits.log_softmax(-1).gather(-1, answers[..., None])[..., 0]
        if step == 0:  # the policy that wrote the answers, and where it looked
            old_log_p, reference = log_p.detach(), captured.snapshot()
        ratio, gain = (log_p - old_log_p).exp(), advantages[:, None]
        grpo = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain)[mask].mean()
        ral = captured.ral_loss(reference, advantages, mask)
        (grpo + RAL_WEIGHT * ral).backward()
        divergence = captured.divergence(reference)[mask].mean()
        print(f"batch {number} step {step}: reward {rewards.mean():.2f}, JSD {divergence:.3g}")
        optimizer.step()
        optimizer.zero_grad()
