"""Where routing decides: GRPO on a tiny mixture of experts, with and without the router term.

    python -m benchmarks.router_study --quick     # two seeds, short runs
    python -m benchmarks.router_study             # the study: five seeds

The task: a rule (one of 4 permutations of 16 symbols) and a symbol; the answer applies the rule six
times. The reward is the share of right steps, each judged from the symbol before it. The model is a
Qwen3-MoE of one layer with 8 narrow experts, of which a token gets 2. Supervised training teaches
it the rules. Then noise is added to the router's weights, and reinforcement learning moves nothing
else: whatever is gained, routing gained. The balance loss stays in every arm.

Arms, of the same start and the same number of rollouts, five seeds:
    grpo        λ = 0
    router-1    λ = 1: L += λ E_t[A_t JSD(g^t ‖ g_old^t)]
    router-10   λ = 10
    shuffled    λ = 10, the term's advantages shuffled among the rollouts of a batch

Endpoint: the share of right steps of greedy answers to all 64 questions, after the last batch.
Second: rollouts until the share first passes 90 % (not reached counts as all).

Prediction, written before any run:
    1. No arm differs from grpo at the endpoint by more than its 95 % interval: the term is of
       second order in the step, and the first symbol's row has no signal.
    2. router-1 is grpo within rounding of the table: its gradient is below a tenth of GRPO's.
    3. router-10 and shuffled are alike: what the term does at that weight is to change the size of
       a step, not its direction. If router-10 is better than both grpo and shuffled, 3 is wrong.
"""

from __future__ import annotations

import argparse
import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ral_kernels as rk
from benchmarks.harness import results
from benchmarks.study.statistics import estimate

SYMBOLS, RULES, STEPS = 16, 4, 6  # steps of an answer
PROMPTS, GROUP, INNER_STEPS = 16, 8, 3
CLIP, BALANCE = 0.2, 0.01
REACHED = 0.9
ARMS = {"grpo": 0.0, "router-1": 1.0, "router-10": 10.0, "shuffled": 10.0}


@dataclass(frozen=True)
class Plan:
    """Sizes of a run: `start_steps` of supervised training, `batches` of rollouts."""

    start_steps: int = 150
    batches: int = 60
    every: int = 5  # batches between evaluations
    noise: float = 6.0  # of the router's weights, in their standard deviations
    learning_rate: float = 1e-2


QUICK = Plan(batches=15)


def rules() -> Tensor:
    """[RULES, SYMBOLS]: the symbol that follows under each rule; the same for all seeds."""
    generator = torch.Generator().manual_seed(0)
    return torch.stack([torch.randperm(SYMBOLS, generator=generator) for _ in range(RULES)])


def questions() -> Tensor:
    """[64, 2]: every rule, as a token of its own, with every symbol."""
    return torch.cartesian_prod(SYMBOLS + torch.arange(RULES), torch.arange(SYMBOLS))


def right(ids: Tensor) -> Tensor:
    """[B, STEPS] bool: which symbols of [B, 2 + STEPS] follow the one before by the rule."""
    return ids[:, 2:] == rules()[ids[:, :1] - SYMBOLS, ids[:, 1:-1]]


def make_start(plan: Plan, seed: int) -> Any:
    """The supervised model with a disturbed router, of which only the router may be trained."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(seed)
    config = Qwen3MoeConfig(
        vocab_size=SYMBOLS + RULES, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16, norm_topk_prob=True, max_position_embeddings=64,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model: Any = Qwen3MoeForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(plan.start_steps):
        ids = questions()[torch.randint(len(questions()), (64,))]
        for _ in range(STEPS):
            ids = torch.cat([ids, rules()[ids[:, :1] - SYMBOLS, ids[:, -1:]]], 1)
        out = model(ids, use_cache=False, output_router_logits=True)
        loss = torch.nn.functional.cross_entropy(
            out.logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten()
        )
        (loss + BALANCE * out.aux_loss).backward()
        optimizer.step()
        optimizer.zero_grad()
    model.requires_grad_(False)
    gate = model.model.layers[0].mlp.gate.weight
    gate.add_(plan.noise * gate.std() * torch.randn_like(gate))
    gate.requires_grad_(True)
    return model


@torch.no_grad()
def answer(model: Any, asked: Tensor, greedy: bool) -> Tensor:
    """[B, 2] questions -> [B, 2 + STEPS] with their answers, of symbols alone."""
    ids = asked
    for _ in range(STEPS):
        logits = model(ids, use_cache=False).logits[:, -1, :SYMBOLS]
        chosen = logits.argmax(-1) if greedy else torch.multinomial(logits.softmax(-1), 1)[:, 0]
        ids = torch.cat([ids, chosen[:, None]], 1)
    return ids


def accuracy(model: Any) -> float:
    return right(answer(model, questions(), greedy=True)).float().mean().item()


def update(model: Any, optimizer: Any, ids: Tensor, arm: str) -> list[float]:
    """The inner steps on a rollout batch; returns the mean divergence of the routers in each."""
    rewards = right(ids).float().mean(1)
    groups = rewards.view(PROMPTS, GROUP)
    advantages = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    advantages = advantages.view(-1)
    # Drawn in every arm, so that all draw the same rollouts from the same weights.
    order = torch.randperm(len(advantages))
    of_term = advantages[order] if arm == "shuffled" else advantages
    divergences, kept = [], None
    for _ in range(INNER_STEPS):
        with rk.capture_router(model, 0, rows=(1, 1 + STEPS)) as routed:
            out = model(ids, use_cache=False, output_router_logits=True)
        log_p = out.logits[:, 1:-1, :SYMBOLS].log_softmax(-1).gather(-1, ids[:, 2:, None])[..., 0]
        if kept is None:
            kept = log_p.detach(), routed.snapshot()
        old_log_p, reference = kept
        ratio, gain = (log_p - old_log_p).exp(), advantages[:, None]
        loss = -torch.min(ratio * gain, ratio.clamp(1 - CLIP, 1 + CLIP) * gain).mean()
        loss = loss + BALANCE * out.aux_loss
        p = routed.policy()
        if ARMS[arm] > 0:
            loss = loss + ARMS[arm] * rk.policy_loss(p, reference, of_term, logits=False)
        divergences.append(rk.divergence(p.detach(), reference).mean().item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return divergences


def train(plan: Plan, arm: str, seed: int, start: Any) -> dict[str, Any]:
    """One arm from the seed's start, which `make_start` made and which stays as it is.

    Returns:
        arm, seed; curve: [batches, accuracy] of each evaluation, the start first; rollouts until
        `REACHED`; divergence by inner step, averaged over batches.
    """
    model = copy.deepcopy(start)
    optimizer = torch.optim.Adam(
        [x for x in model.parameters() if x.requires_grad], plan.learning_rate
    )
    torch.manual_seed(1000 + seed)
    curve, divergences = [[0, accuracy(model)]], []
    for batch in range(1, plan.batches + 1):
        asked = questions()[torch.randint(len(questions()), (PROMPTS,))]
        ids = answer(model, asked.repeat_interleave(GROUP, 0), greedy=False)
        divergences.append(update(model, optimizer, ids, arm))
        if batch % plan.every == 0 or batch == plan.batches:
            curve.append([batch, accuracy(model)])
    reached = next((batch for batch, value in curve if value >= REACHED), plan.batches)
    return {
        "arm": arm,
        "seed": seed,
        "curve": curve,
        "accuracy": curve[-1][1],
        "rollouts": reached * PROMPTS * GROUP,
        "divergence": torch.tensor(divergences).mean(0).tolist(),
    }


def report(runs: Sequence[dict[str, Any]]) -> list[str]:
    """The table: each arm, and what it differs from grpo by, seed by seed."""
    by_arm = {arm: sorted((r for r in runs if r["arm"] == arm), key=lambda r: r["seed"])
              for arm in ARMS}  # fmt: skip
    lines = ["arm        accuracy      less grpo      rollouts to 90 %   last JSD"]
    for arm, of_arm in by_arm.items():
        pairs = zip(of_arm, by_arm["grpo"], strict=True)
        less = estimate([run["accuracy"] - plain["accuracy"] for run, plain in pairs])
        rollouts = sum(run["rollouts"] for run in of_arm) / len(of_arm)
        divergence = sum(run["divergence"][-1] for run in of_arm) / len(of_arm)
        mean = estimate([run["accuracy"] for run in of_arm])
        lines.append(
            f"{arm:<10} {mean!s:<13} {less.signed:<14} {rollouts:<18,.0f} {divergence:.3g}"
        )
    starts = estimate([run["curve"][0][1] for run in by_arm["grpo"]])
    return [*lines, f"start: {starts}"]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.router_study",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    results.add_arguments(parser, "two seeds and 15 batches")
    parser.add_argument("--seeds", type=int, default=None, help="how many (default 5, or 2)")
    parser.add_argument("--first-seed", type=int, default=0, help="default 0")
    options = results.parse(parser, arguments)
    plan, seeds = (QUICK, 2) if options.quick else (Plan(), 5)
    seeds = seeds if options.seeds is None else options.seeds
    torch.set_num_threads(1)  # two threads are slower than one for a model of this size
    run = results.begin("router_study", options, {**vars(plan), "seeds": seeds, "arms": ARMS})
    run["runs"] = []
    for seed in range(options.first_seed, options.first_seed + seeds):
        start = make_start(plan, seed)
        for arm in ARMS:
            run["runs"].append(train(plan, arm, seed, start))
            print(f"seed {seed} {arm:<10} accuracy {run['runs'][-1]['accuracy']:.3f}", flush=True)
    print("\n" + "\n".join(report(run["runs"])))
    results.finish(run, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
