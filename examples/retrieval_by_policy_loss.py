"""RAL for a choice that is not attention: which document to open next, in three hops.

    python examples/retrieval_by_policy_loss.py

Each document names the next one, and the policy has to find out how. It opens one out of 12, three
times; the reward is the share of right hops. GRPO trains it in groups of 8 answers to a question,
three steps on the same answers, and `rk.policy_loss` adds RAL for the choice of a document.

The first hop sees the question alone, which is the same for the whole group. There the advantages
cancel, so RAL acts on the later hops, whose last document differs.
"""

import torch
from torch import Tensor, nn

import ral_kernels as rk

DOCUMENTS, HOPS = 12, 3
QUESTIONS, GROUP = 16, 8  # of a batch, and answers to each
BATCHES, INNER_STEPS = 30, 3  # in the first step on its answers, RAL is exactly zero
RAL_WEIGHT = 1.0  # λ

torch.manual_seed(0)
following = torch.randperm(DOCUMENTS)  # what the policy has to learn
policy = nn.Sequential(nn.Embedding(DOCUMENTS, 32), nn.Tanh(), nn.Linear(32, DOCUMENTS))
optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-2)


def answer(asked: Tensor) -> Tensor:
    """[B] questions -> the documents [B, HOPS + 1] that were open, the question's first."""
    opened = [asked]
    for _ in range(HOPS):
        opened.append(torch.multinomial(policy(opened[-1]).softmax(-1), 1)[:, 0])
    return torch.stack(opened, 1)


for number in range(BATCHES):
    asked = torch.randint(DOCUMENTS, (QUESTIONS,)).repeat_interleave(GROUP)
    with torch.no_grad():
        opened = answer(asked)
    seen, chosen = opened[:, :-1], opened[:, 1:]
    rewards = (chosen == following[seen]).float().mean(1)
    groups = rewards.view(QUESTIONS, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1)

    divergences = []
    for step in range(INNER_STEPS):
        logits = policy(seen)  # [B, HOPS, DOCUMENTS]
        log_p = logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]
        if step == 0:  # the policy that chose
            old_log_p, reference = log_p.detach(), logits.detach()
        ratio, gain = (log_p - old_log_p).exp(), advantages[:, None]
        grpo = -torch.min(ratio * gain, ratio.clamp(0.8, 1.2) * gain).mean()
        ral = rk.policy_loss(logits, reference, advantages, logits=True)
        (grpo + RAL_WEIGHT * ral).backward()
        divergences.append(rk.divergence(logits.softmax(-1), reference.softmax(-1)).mean().item())
        optimizer.step()
        optimizer.zero_grad()
    shown = ", ".join(f"{value:.3g}" for value in divergences)
    print(f"batch {number}: reward {rewards.mean():.2f}, JSD by step {shown}")
