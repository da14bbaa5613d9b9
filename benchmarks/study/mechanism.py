"""What training did to attention on the task `chain`: after a study that kept its weights.

python -m benchmarks.study.mechanism RUNS

RUNS is the folder of `python -m benchmarks.figure3 --tasks chain --keep-weights --runs RUNS`. The
start writes rollouts on held-out rows, once. The start and every trained model read the same
rollouts, so that arms differ in attention alone. Two tables are printed, means over seeds:

- attention on the right frame at looks 1 to 4 of the right response, after training;
- on the rollouts: how attention on the frame that the rollout has just named changed, where the
  start had at least half of it there, and where not, and where the digit that follows is wrong;
  the divergence from the start; and the correlations, over tokens whose prefix differs within the
  group, of that change and that divergence with the rollout's advantage.

All of it is of one layer's head mean over frames. RAL lowers A · JSD, so a trace of it would be a
correlation of the divergence with the advantage that is below GRPO's. The last column has that
difference, paired by seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import ral_kernels as rk
from ral.attention_statistics import differing_prefixes
from ral.digits.puzzles import SECONDS
from ral.digits.tasks import puzzle_of

from .arms import ARMS, BUDGET
from .decoder import Decoder
from .evaluate import TEST_SEED
from .prompts import Reader
from .report import Run, label_of, plain
from .run import Bench, Plan, be_on
from .statistics import Estimate, estimate, paired
from .tasks import TASKS

TASK = TASKS["chain"]
EXTENTS = (16, 24)  # the longest that is trained on, and the first of the endpoint
GROUPS = 48
LAYER = -1
HELD = 0.5  # of the attention: from there on it was right before


@dataclass(frozen=True)
class Change:
    """What training changed at one extent; shares of attention, and correlations.

    Attributes:
        right_before: mean change of the share on the named frame where it was `HELD` or more.
        wrong_before: where it was less.
        misread: where the digit that follows is not the named frame's.
        share_right: of looks, where it was `HELD` or more.
        divergence: mean JSD from the start's attention over frames, in nats, of all tokens.
        differing: share of tokens whose prefix differs within the group.
        with_reward: correlation of the share's change with the advantage, over looks.
        divergence_with_reward: correlation of the divergence with it, over tokens.
    """

    right_before: float
    wrong_before: float
    misread: float
    share_right: float
    divergence: float
    differing: float
    with_reward: float
    divergence_with_reward: float


class Watched:
    """Rollouts of the start at one extent, and what models look at as they read them.

    Args:
        reader: of the models' prompts.
        start: what writes the rollouts.
        extent: frames.
        groups: prompts, each with as many rollouts as in training.
        seed: of the evaluation's rows; these are others.
    """

    def __init__(
        self, reader: Reader, start: Decoder, extent: int, groups: int = GROUPS,
        seed: int = TEST_SEED,
    ) -> None:  # fmt: skip
        self._size: int = BUDGET["num_generations"]
        self.rows = list(TASK.rows(groups, extent, "test", seed + 2))
        self.chains: list[Any] = [
            puzzle_of("chain", extent, "test", seed + 2, number) for number in range(groups)
        ]
        self._prompts = reader.encode(self.rows)
        self.of = torch.arange(groups).repeat_interleave(self._size)
        self._tokenizer = reader.tokenizer
        inputs = {
            "input_ids": self._prompts.ids, "attention_mask": self._prompts.mask.long(),
            "image_grid_thw": self._prompts.fields["image_grid_thw"],
        }  # fmt: skip
        self._spans = rk.spans_for(reader.config, inputs, "frame").spans
        end = self._tokenizer.eos_token_id
        self.ids = self._write(start, reader, end, seed)
        ended = (self.ids == end).long()
        self.mask = (ended.cumsum(-1) - ended) == 0
        self.advantages = self._advantages()
        self.named, self.misread = named_frames(
            self._tokenizer, self.ids, [self.chains[row] for row in self.of.tolist()]
        )
        self.before = self.policy(start)

    @torch.no_grad()
    def _write(self, start: Decoder, reader: Reader, end: int, seed: int) -> Tensor:
        generator = torch.Generator(start.device).manual_seed(seed)

        def choose(logits: Tensor) -> Tensor:
            logits[:, reader.suppressed] = float("-inf")
            p = (logits / BUDGET["temperature"]).softmax(-1)
            return p.multinomial(1, generator=generator)[:, 0]

        return start.generate(
            *self._prompts.begun(start, self.of), self._prompts.start[self.of], choose,
            longest=TASK.longest, end=end, pad=self._tokenizer.pad_token_id,
        )  # fmt: skip

    def _advantages(self) -> Tensor:
        """float32 [B]."""
        from ral.rewards import combined_reward

        said = self._tokenizer.batch_decode(self.ids, skip_special_tokens=True)
        asked = [self.rows[row] for row in self.of.tolist()]
        rewards = torch.tensor(
            combined_reward(TASK.style)(
                [[{"role": "assistant", "content": text}] for text in said],
                [row["solution"] for row in asked], [row["problem_type"] for row in asked],
            )
        ).view(-1, self._size)  # fmt: skip
        spread = rewards.std(1, keepdim=True) + 1e-4
        return ((rewards - rewards.mean(1, keepdim=True)) / spread).flatten()

    @torch.no_grad()
    def policy(self, model: Decoder) -> Tensor:
        """Attention over frames as each token of the rollouts is predicted, [B, C, frames]."""
        tokens, past = self._prompts.begun(model, self.of)
        later = torch.arange(self.ids.shape[1]) + self._prompts.start[self.of][:, None]
        rows = tokens.then(model.text(self.ids, self.mask, later))
        ids = functional.pad(self._spans.ids[self.of], (0, self.ids.shape[1]), value=-1)
        spans = rk.Spans(ids, self._spans.num_spans)
        with rk.capture(model, LAYER, rows=(0, self.ids.shape[1]), spans=spans) as captured:
            model(**rows._asdict(), past=past)
        found: Tensor = captured.policy(layer=captured.layers[0])
        return found

    def change(self, model: Decoder) -> Change:
        """What differs between the start and a model that was trained from it."""
        after = self.policy(model)
        looks = (self.named >= 0) & self.mask
        at = self.named.clamp(min=0)[..., None]
        was, now = (p.gather(2, at)[..., 0] for p in (self.before, after))
        moved = now - was
        held = was >= HELD
        divergence = rk.divergence(after, self.before, "jsd")
        groups = differing(self.ids, self.mask, self._size)
        advantages = self.advantages[:, None].expand_as(self.mask)
        count, total = differing_prefixes(self.ids, self.mask, self._size).tolist()

        def mean(x: Tensor, chosen: Tensor) -> float:
            return float(x[chosen].mean())

        def correlation(x: Tensor, chosen: Tensor) -> float:
            return float(torch.corrcoef(torch.stack([x[chosen], advantages[chosen]]))[0, 1])

        return Change(
            mean(moved, looks & held), mean(moved, looks & ~held),
            mean(moved, looks & self.misread), mean(held.float(), looks),
            mean(divergence, self.mask), count / max(1, total),
            correlation(moved, looks & groups), correlation(divergence, self.mask & groups),
        )  # fmt: skip


def differing(ids: Tensor, mask: Tensor, size: int) -> Tensor:
    """bool [B, C]: the tokens whose prefix is not that of the whole group.

    Args:
        ids, mask: [B, C], rollouts of a group side by side, `size` of them.
    """
    tokens = torch.where(mask, ids, -1).unflatten(0, (-1, size))
    same = (tokens == tokens[:, :1]).all(1).long().cumprod(-1)
    before = functional.pad(same, (1, 0), value=1)[:, :-1]
    return (before == 0).repeat_interleave(size, 0) & mask


def named_frames(tokenizer: Any, ids: Tensor, chains: Sequence[Any]) -> tuple[Tensor, Tensor]:
    """Where rollouts read a digit, and whether it is wrong.

    Args:
        tokenizer: of the rollouts.
        ids: int64 [B, C].
        chains: the puzzle of each.

    Returns:
        int64 [B, C], for a digit that follows a frame's time, or that time and one digit, the
        frame; elsewhere −1. And bool [B, C], where that digit is not the one in its tile.
    """
    seconds = {_one(tokenizer, f" {second}s"): second for second in range(SECONDS)}
    digits = {_one(tokenizer, f" {digit}"): digit for digit in range(10)}
    named = torch.full(ids.shape, -1)
    misread = torch.zeros(ids.shape, dtype=torch.bool)
    for row, (said, chain) in enumerate(zip(ids.tolist(), chains, strict=True)):
        frames = {int(time): frame for frame, time in enumerate(chain.times)}
        for at, word in enumerate(said):
            frame = frames.get(seconds.get(word, -1))
            if frame is None:
                continue
            for place, wanted in enumerate(divmod(int(chain.numbers[frame]), 10), start=1):
                read = digits.get(said[at + place]) if at + place < len(said) else None
                if read is None:
                    break
                named[row, at + place] = frame
                misread[row, at + place] = read != wanted
    return named, misread


def _one(tokenizer: Any, word: str) -> int:
    (found,) = tokenizer(word)["input_ids"]
    return int(found)


def of_study(plan: Plan, runs: Sequence[Run]) -> dict[tuple[str, int, int], Change]:
    """By arm, seed and extent, for the runs whose weights were kept."""
    from safetensors.torch import load_file

    bench = Bench.of(plan, TASK, TASK.style)
    start, model = bench.model(bench.start), bench.model(bench.start)
    found = {}
    for extent in EXTENTS:
        watched = Watched(bench.reader, start, extent, seed=plan.test_seed)
        for run in runs:
            weights = plan.weights("chain", run["arm"], run["seed"])
            if weights.exists():
                model.load_weights(load_file(weights))
                found[run["arm"], run["seed"], extent] = watched.change(model)
    return found


def at_looks(runs: Sequence[Run]) -> list[list[str]]:
    """Attention on the right frame at each look, tens and units together; first the heads."""
    lines = [["arm", "seeds", *(f"{size} frames" for size in TASK.evaluated)]]
    for arm, mine in _by_arm(runs):
        cells = []
        for size in TASK.evaluated:
            queries = [run["target_queries"][str(size)][LAYER] for run in mine]
            means = [fmean(values) for values in zip(*queries, strict=True)]
            looks = [fmean(means[n : n + 2]) for n in range(0, len(means), 2)]
            cells.append(", ".join(f"{100 * look:.0f}" for look in looks))
        lines.append([label_of(arm), str(len(mine)), *cells])
    return lines


def changes(
    runs: Sequence[Run], of: dict[tuple[str, int, int], Change], extent: int
) -> list[list[str]]:
    """The change at one extent, mean over seeds; first the heads."""
    lines = [[
        f"arm, {extent} frames", "seeds", "right before", "wrong before", "misread", "JSD, 1e-3",
        "change ~ advantage", "JSD ~ advantage", "... less GRPO's",
    ]]  # fmt: skip
    of_grpo = {
        seed: change.divergence_with_reward
        for (arm, seed, size), change in of.items() if arm == "grpo" and size == extent
    }  # fmt: skip
    for arm, mine in _by_arm(runs):
        of_seed = {n: of[key] for run in mine if (key := (arm, n := run["seed"], extent)) in of}
        found = list(of_seed.values())
        if not found:
            continue
        correlations = {seed: change.divergence_with_reward for seed, change in of_seed.items()}
        over_grpo = paired(correlations, of_grpo) if arm != "grpo" else None
        lines.append([
            label_of(arm), str(len(found)),
            *(estimate([getattr(x, name) for x in found]).signed
              for name in ("right_before", "wrong_before", "misread")),
            f"{1e3 * fmean(x.divergence for x in found):.1f}",
            *(_plain(estimate([getattr(x, name) for x in found]))
              for name in ("with_reward", "divergence_with_reward")),
            "" if over_grpo is None else _plain(over_grpo),
        ])  # fmt: skip
    return lines


def _plain(found: Estimate) -> str:
    half = "" if found.seeds == 1 else f" ± {found.half_width:.3f}"
    return f"{found.mean:+.3f}{half}".replace("-", "−")


def _by_arm(runs: Sequence[Run]) -> list[tuple[str, list[Run]]]:
    order = ["start", "teacher", *(arm.name for arm in ARMS)]
    of = [(arm, [run for run in runs if run["arm"] == arm]) for arm in order]
    return [(arm, mine) for arm, mine in of if mine]


def main(arguments: Sequence[str] | None = None) -> int:
    import json

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("runs", type=Path, help="folder of the study's starts and runs")
    parser.add_argument("--start-seed", type=int, default=0)
    parser.add_argument("--test-seed", type=int, default=TEST_SEED)
    options = parser.parse_args(arguments)
    be_on("cpu")
    plan = Plan(options.runs, None, 256, options.start_seed, test_seed=options.test_seed)
    files = sorted((options.runs / "runs").glob("chain-*.json"))
    runs = [json.loads(file.read_text()) for file in files]
    print(plain(at_looks(runs)) + "\n")
    of = of_study(plan, runs)
    for extent in EXTENTS:
        first = next((change for key, change in of.items() if key[2] == extent), None)
        if first is not None:
            print(f"{extent} frames: the start has {HELD:g} or more on the named frame in "
                  f"{first.share_right:.0%} of looks; {first.differing:.0%} of tokens have "
                  "prefixes that differ")  # fmt: skip
            print(plain(changes(runs, of, extent)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
