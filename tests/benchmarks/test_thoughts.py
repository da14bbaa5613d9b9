"""Swapped thoughts of the task `chain`: what is written, and what a model that obeys would say."""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.study import thoughts
from benchmarks.study.decoder import Decoder
from benchmarks.study.prompts import Reader
from benchmarks.study.tasks import TASKS
from ral.digits.chains import CELL_NAMES, WORDS, make_cell_chain, make_chain
from ral.digits.model import make_model, make_processor, make_tokenizer

pytestmark = pytest.mark.xdist_group("study")


def test_a_swapped_thought_leads_to_the_named_frame() -> None:
    chain = make_chain(8, "test", 3, 5)
    times: Any = chain.times
    for look in (1, 3):
        for to in set(range(8)) - {int(chain.path[look])}:
            alone, follows = thoughts.swapped(chain, look, to, digits=False)
            both, again = thoughts.swapped(chain, look, to, digits=True)
            assert follows == again
            assert alone.endswith(f" {times[to]}s") and both.endswith(f" {times[to]}s")
            assert both.split(" ")[-3:-1] == [*f"{times[to]:02}"]
            assert alone.split(" ")[-3:-1] == [*f"{times[chain.path[look]]:02}"]
            frame = to
            for done in range(look, chain.looks):
                if done == look:
                    assert follows["named"].split() == [*f"{chain.numbers[frame]:02}"]
                frame = times.tolist().index(chain.numbers[frame])
            assert follows["answer"] == f">{times[frame]}s<"
            assert follows["replaced"].split() == [*f"{chain.numbers[chain.path[look]]:02}"]


def test_a_swapped_thought_leads_to_the_named_cell() -> None:
    chain = make_cell_chain(3, "test", 3, 5)
    for look in (1, 3):
        for to in set(range(9)) - {int(chain.path[look])}:
            begin, follows = thoughts.swapped(chain, look, to, digits=False)
            right = begin.removeprefix("<think>").split(" ")[1:]
            names = [" ".join(right[n : n + 2]) for n in range(0, len(right), 2)]
            assert names == [chain.names[cell] for cell in chain.path[:look]] + [chain.names[to]]
            assert follows["replaced"] == f" {chain.names[chain.path[look + 1]]}"
            cell = to
            for done in range(look, chain.looks):
                name = CELL_NAMES[chain.numbers[cell]]
                if done == look:
                    assert follows["named"] == f" {name}"
                cell = chain.names.index(name)
            assert follows["answer"] == f">{chain.names[cell].replace(' ', '')}<"


def test_an_untrained_start_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thoughts, "ROWS", 6)
    monkeypatch.setattr(thoughts, "GROUPS", 2)
    processor = make_processor(make_tokenizer(WORDS))
    model = make_model(tokenizer=processor.tokenizer)
    rows = thoughts.Rows(Reader(model, processor), TASKS["chain"], 6)
    decoder = Decoder.of(make_model(tokenizer=processor.tokenizer))
    assert thoughts.swap(decoder, rows, True)["answer"] == 0
    assert thoughts.spread(decoder, rows) == {"right": 0, "differ": 0}


def test_an_obedient_model_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Responses that go on from what is written, as a right model's would."""
    monkeypatch.setattr(thoughts, "ROWS", 12)

    class Obedient(thoughts.Rows):
        def __init__(self) -> None:
            self.chains = [make_chain(8, "test", 3, index) for index in range(12)]

        def responses(self, model: Any, of: Any, begins: Any, temperature: float) -> list[str]:
            said = []
            for row, begin in zip(of.tolist(), begins, strict=True):
                chain, words = self.chains[row], begin.split(" ")
                times = chain.times.tolist()
                frame, text = times.index(int(words[-1][:-1])), ""
                for _ in range((len(words) - 2) // 3, chain.looks):
                    number = chain.numbers[frame]
                    text += f" {number // 10} {number % 10} {number}s"
                    frame = times.index(number)
                said.append(f"{text}</think><answer>{times[frame]}s</answer>")
            return said

    shares = thoughts.swap(None, Obedient(), True)  # type: ignore[arg-type]
    assert shares == {"named": 1.0, "replaced": 0.0, "answer": 1.0}
