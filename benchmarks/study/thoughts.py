"""What a start's thoughts are for, and what its rollouts leave to learn, on chains of looks.

python -m benchmarks.study.thoughts FOLDER      # --task chain_cells

FOLDER has the start, as `python -m benchmarks.figure3 --tasks chain --runs RUNS` leaves it in
RUNS/starts/chain-think-0. In a right thought, the time that a look names is replaced by that of
another frame: alone, or with the two digits before it that say the same. Shares of rows say what
follows:

- named: the digits of the frame that is named now;
- replaced: those of the frame that was named before;
- answer: the answer of the chain from the frame that is named now.

Cells are named by what is read, so there a name is replaced whole.

Then rollouts: the share of right ones, and of groups whose rewards differ.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ral.digits.chains import CELL_NAMES, CellChain, Chain, thought
from ral.digits.tasks import puzzle_of

from .arms import BUDGET
from .decoder import Decoder
from .prompts import Reader
from .tasks import TASKS, StudyTask

SEED = 7_000_005  # of these rows; neither training nor evaluation uses it
ROWS, GROUPS = 128, 64


def swapped(chain: Chain, look: int, to: int, digits: bool) -> tuple[str, dict[str, str]]:
    """The begin of a thought that names another frame, and what each frame would make follow.

    Args:
        chain: the frames, or cells.
        look: which look names the frame, from the second one, number 1.
        to: the frame.
        digits: whether the digits before the time name it too; in cells the name is all there is.

    Returns:
        The thought up to the name; by "named" and "replaced" what is read next, and by "answer" the
        answer of the chain that goes on from `to`.
    """
    path = chain.path.tolist()
    end = path[(path.index(to) + chain.looks - look) % len(path)]
    words = thought(chain)[0].split(" ")
    if isinstance(chain, CellChain):
        words = [*words[: 2 * look + 1], *chain.names[to].split(" ")]
        read = [f" {CELL_NAMES[number]}" for number in chain.numbers]
    else:
        assert chain.times is not None
        words = [*words[: 3 * look + 1], chain.names[to]]
        if digits:
            words[-3:-1] = str(chain.times[to] // 10), str(chain.times[to] % 10)
        read = [chain.spelt(frame) for frame in range(len(path))]
    answer = chain.names[end].replace(" ", "")
    return "<think>" + " ".join(words), {
        "named": read[to], "replaced": read[path[look]], "answer": f">{answer}<",
    }  # fmt: skip


class Rows:
    """Rows of one extent, and a model's responses to them.

    Args:
        reader: of the model's prompts.
        task: a chain.
        extent: frames of a row, or cells on a side.
    """

    def __init__(self, reader: Reader, task: StudyTask, extent: int) -> None:
        self._reader, self.task = reader, task
        self.rows = list(task.rows(ROWS, extent, "test", SEED))
        self._prompts = reader.encode(self.rows)
        name: Any = task.name
        self.chains: list[Any] = [puzzle_of(name, extent, "test", SEED, i) for i in range(ROWS)]

    @torch.inference_mode()
    def responses(
        self, model: Decoder, of: Tensor, begins: Sequence[str] | None, temperature: float
    ) -> list[str]:
        """Responses to some of the rows; greedy where `temperature` is 0.

        Args:
            model: what answers.
            of: int64 [B], the rows.
            begins: of the responses, all of one number of tokens; they are not repeated.
            temperature: of the sampling, from torch's own generator.
        """
        tokenizer, prompts = self._reader.tokenizer, self._prompts
        given = tokenizer(list(begins))["input_ids"] if begins else [[]] * len(of)
        written = torch.tensor(given).T  # [tokens, B]
        step = iter(range(len(written) + self.task.longest))

        def choose(logits: Tensor) -> Tensor:
            at = next(step)
            if at < len(written):
                return written[at]
            logits[:, self._reader.suppressed] = float("-inf")
            if temperature == 0:
                return logits.argmax(-1)
            return (logits / temperature).softmax(-1).multinomial(1)[:, 0]

        said = model.generate(
            *prompts.begun(model, of), prompts.start[of], choose, longest=self.task.longest,
            end=tokenizer.eos_token_id, pad=tokenizer.pad_token_id,
        )  # fmt: skip
        return list(tokenizer.batch_decode(said[:, len(written) :], skip_special_tokens=True))


def swap(model: Decoder, rows: Rows, digits: bool) -> dict[str, float]:
    """Shares of rows: after a swapped name comes what "named", "replaced" and "answer" say."""
    rng = np.random.default_rng(SEED)
    found = {"named": 0, "replaced": 0, "answer": 0}
    look_of = rng.integers(1, rows.chains[0].looks, size=ROWS)
    for look in np.unique(look_of):
        of = np.flatnonzero(look_of == look)
        begins, wanted = [], []
        for chain in (rows.chains[row] for row in of):
            to = rng.choice(np.delete(np.arange(len(chain.path)), chain.path[look]))
            begin, follows = swapped(chain, int(look), int(to), digits)
            begins.append(begin)
            wanted.append(follows)
        said = rows.responses(model, torch.from_numpy(of), begins, 0.0)
        for text, follows in zip(said, wanted, strict=True):
            found["answer"] += follows.pop("answer") in text
            for name, spelt in follows.items():
                found[name] += text.startswith(spelt)
    return {name: count / ROWS for name, count in found.items()}


def spread(model: Decoder, rows: Rows, seed: int = 0) -> dict[str, float]:
    """Shares: "right" rollouts, and groups whose rewards "differ"."""
    from ral.rewards import combined_reward

    size = BUDGET["num_generations"]
    of = torch.arange(GROUPS).repeat_interleave(size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        said = rows.responses(model, of, None, BUDGET["temperature"])
    asked = [rows.rows[row] for row in of.tolist()]
    rewards = combined_reward(rows.task.style)(
        [[{"role": "assistant", "content": text}] for text in said],
        [row["solution"] for row in asked], [row["problem_type"] for row in asked],
    )  # fmt: skip
    grouped = np.array(rewards).reshape(GROUPS, size)
    right = [f"<answer>{row['solution']}</answer>" in text
             for row, text in zip(asked, said, strict=True)]  # fmt: skip
    return {
        "right": float(np.mean(right)),
        "differ": float(np.mean(np.ptp(grouped, axis=1) > 1e-6)),
    }


def main(folder: str, name: str = "chain") -> None:
    from ral.models import load_model, load_processor

    torch.set_num_threads(1)
    model = load_model(folder, dtype="float32")
    reader = Reader(model, load_processor(folder))
    decoder = Decoder.of(model)
    task = TASKS[name]
    swaps = {"time swapped": False, "time and digits swapped": True}
    if task.axis == "cells":
        swaps = {"name swapped": False}
    for extent in task.evaluated:
        rows = Rows(reader, task, extent)
        made = {what: swap(decoder, rows, digits) for what, digits in swaps.items()}
        for what, shares in {**made, "rollouts": spread(decoder, rows)}.items():
            print(f"{extent} {task.axis}, {what}:",
                  ", ".join(f"{name} {share:.2f}" for name, share in shares.items()))  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", help="of the start")
    parser.add_argument("--task", choices=("chain", "chain_cells"), default="chain")
    options = parser.parse_args()
    main(options.folder, options.task)
