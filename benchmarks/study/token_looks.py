"""Which tokens look at the asked cell after GRPO alone: of the question, and of the response.

python -m benchmarks.study.token_looks --wrong-share 1

Trains one run of the study of objectives from its start, and prints each token's share of attention
on the asked cell, in each layer: the mean over heads and held-out rows, of that on all cells.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from . import run as one
from .arms import BY_NAME
from .decoder import Decoder
from .report import markdown
from .tasks import TASKS

TASK = TASKS["resolution"]


def table(bench: one.Bench, model: Decoder, extent: int) -> list[list[str]]:
    """A line a token; first the heads."""
    watch = bench.target(extent)
    shares: Tensor = watch.of_tokens(model)
    first = watch.first_text
    asks = watch.prompts.ids[:, first : first + shares.shape[1]]
    lines = [["token", *(f"layer {n + 1}" for n in range(len(shares)))]]
    for place, ids in enumerate(asks.T):
        token = bench.reader.tokenizer.decode(ids[:1]).strip() or "newline"
        name = token if (ids == ids[0]).all() else "the colour"
        lines.append([name, *(f"{100 * share:.0f} %" for share in shares[:, place].tolist())])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--wrong-share", type=float, help="as for benchmarks.figure3")
    parser.add_argument("--start-seed", type=int, default=0, help="of the supervised start")
    parser.add_argument("--batches", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extent", type=int, default=8, help="cells on a side")
    parser.add_argument("--runs", type=Path, help="folder of starts; default: made for this run")
    options = parser.parse_args()
    torch.set_num_threads(1)
    one.be_quiet()
    with tempfile.TemporaryDirectory() as made:
        plan = one.Plan(
            options.runs or Path(made), options.batches, 1, start_seed=options.start_seed,
            wrong_share=options.wrong_share,
        )  # fmt: skip
        bench = one.Bench.of(plan, TASK, TASK.style)
        engine = bench.engine(BY_NAME["plain"], options.seed, options.batches)
        engine.train()
        print(markdown(table(bench, engine.policy, options.extent)))


if __name__ == "__main__":
    main()
