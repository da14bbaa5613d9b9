"""Chains of looks: what the frames show, what responses write down, and how they are judged."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from ral.digits import start
from ral.digits.chains import (
    CELL_NAMES,
    CELL_WORDS,
    TENS,
    UNITS,
    WORDS,
    CellChain,
    Chain,
    lay_out,
    make_cell_chain,
    make_chain,
    thought,
)
from ral.digits.evaluate import judge
from ral.digits.model import IMAGE, make_model, make_processor, make_tokenizer
from ral.digits.puzzles import COLOURS, NAMES, SECONDS, draw
from ral.digits.scans import CELL as PIXELS
from ral.digits.scans import load_scans
from ral.digits.tasks import longest, looks_of, make_dataset, puzzle_of
from ral.rewards import combined_reward

LOOK = re.compile(r" (\d+)s (\d) (\d)")
CELL = re.compile(r" ([a-z]+ \d)")


def _chains(frames: int = 8, count: int = 20, looks: int = 4) -> list[Chain]:
    return [make_chain(frames, "test", 3, index, looks) for index in range(count)]


@pytest.mark.parametrize("frames", [6, 100])
def test_numbers_lead_once_through_all_frames(frames: int) -> None:
    for chain in _chains(frames, 5):
        assert chain.times is not None
        times = chain.times.tolist()
        assert sorted(set(times)) == times and times[0] >= 0 and times[-1] < SECONDS
        frame, seen = int(chain.path[0]), []
        for _ in range(frames):
            seen.append(frame)
            frame = times.index(chain.numbers[frame])
        assert seen == chain.path.tolist() and sorted(seen) == list(range(frames))
        assert frame == chain.path[0]
        assert chain.seconds == [times[n] for n in seen[:5]]
        assert (load_scans("test").digits[chain.scans] == chain.digits).all()


def test_each_frame_has_one_red_and_one_blue_tile() -> None:
    """Read off the pixels: the background of a tile is nearest to its own colour."""
    (chain,) = _chains(count=1)
    tiles = draw(chain, "test", 24.0).astype(np.float32).reshape(-1, 2, PIXELS, 2, PIXELS, 3)
    tiles = tiles.transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, PIXELS**2, 3)
    ground = np.median(tiles, axis=2)
    palette = np.array([*COLOURS.values(), (88, 92, 98)])
    nearest = np.abs(ground[:, :, None] - palette).sum(-1).argmin(-1)
    for colour, power in ((TENS, 10), (UNITS, 1)):
        at = nearest == NAMES.index(colour)
        assert (at.sum(1) == 1).all()
        assert (chain.digits[at] == chain.numbers // power % 10).all()


def test_chains_repeat_and_pictures_do_not_depend_on_looks() -> None:
    chain, again = make_chain(8, "train", 3, 5, 2), make_chain(8, "train", 3, 5, (4, 6))
    assert (draw(chain, "train") == draw(again, "train")).all()
    assert chain.looks == 2 and again.looks in (4, 6) and (chain.path == again.path).all()
    for other in (make_chain(8, "train", 4, 5), make_chain(8, "train", 3, 6),
                  make_chain(8, "test", 3, 5)):  # fmt: skip
        assert (draw(chain, "train") != draw(other, "train")).any()


def test_the_answer_cannot_be_told_from_the_start() -> None:
    """Every other frame is the answer as often, wherever the chain starts."""
    frames, count = 8, 2000
    counts = np.zeros((2, frames))
    for chain in _chains(frames, count):
        answer = chain.path[chain.looks]
        counts[:, [answer, (answer - chain.path[0]) % frames]] += np.eye(2)
    assert counts[1, 0] == 0  # never the frame of the start
    expected = count / np.array([[frames], [frames - 1]])
    assert (np.abs(counts - expected)[[0, 1], :][:, 1:] < 5 * expected**0.5).all()


@pytest.mark.parametrize("side", [3, 8])
def test_cells_lead_once_through_all_cells(side: int) -> None:
    """All names differ, and a cell's two tiles have the grounds of its name and of the next one."""
    for index in range(5):
        chain = make_cell_chain(side, "test", 3, index)
        names = chain.names
        assert len(set(names)) == side**2 == len(chain.numbers) and set(names) <= {*CELL_NAMES}
        cell, seen = int(chain.path[0]), []
        for _ in names:
            seen.append(cell)
            cell = names.index(CELL_NAMES[chain.numbers[cell]])
        assert seen == chain.path.tolist() and sorted(seen) == list(range(side**2))
        assert cell == chain.path[0] and chain.cell == seen[3]
        assert (load_scans("test").digits[chain.scans] == chain.digits).all()
        (picture,) = draw(chain, "test").astype(np.float32)
        assert picture.shape == (side * PIXELS, side * PIXELS, 3)
        tiles = picture.reshape(side, PIXELS, 2 * side, PIXELS // 2, 3).swapaxes(1, 2)
        ground = np.median(tiles.reshape(2 * side**2, -1, 3), axis=1)
        palette = np.array([*COLOURS.values()])
        nearest = np.abs(ground[:, None] - palette).sum(-1).argmin(-1)
        # In a narrow tile a thick digit may take more room than the ground.
        assert (nearest == chain.colours[0]).mean() > 0.8


def test_looks_at_cells_are_at_their_own_tokens() -> None:
    """The right response spells the names along the path; each look is at the cell just named."""
    tokenizer = make_tokenizer(CELL_WORDS)
    for looks in (2, 4):
        rows = make_dataset("chain_cells", size=4, grid=(3, 4), looks=looks, seed=3)
        for index, row in enumerate(rows):
            side = row["images"][0].width // PIXELS
            chain = puzzle_of("chain_cells", side, "train", 3, index, looks)
            assert isinstance(chain, CellChain)
            said = row["completion"][0]["content"]
            ids = tokenizer(said)["input_ids"]
            assert tokenizer.decode(ids) == said and len(ids) == 2 * looks + 7
            assert len(ids) < longest("chain_cells", looks)
            names = [chain.names[cell] for cell in chain.path[: looks + 1]]
            assert CELL.findall(said) == names and row["solution"] == names[-1].replace(" ", "")
            asked = row["prompt"][0]["content"][-1]["text"]
            assert asked == f"Start at {names[0]} and follow {looks} times. Which?"
            assert len(tokenizer(asked)["input_ids"]) == 11
            where = looks_of(chain, "think")
            for half in (0, 1):
                for (token, cell), shown in zip(where[half::2], names[1:], strict=True):
                    assert CELL_NAMES[chain.numbers[cell]] == shown
                    assert tokenizer.decode(ids[token + 1]) == f" {shown.split()[half]}"
            assert row["evidence"] == [
                {"image": 0, "box": [PIXELS * x for x in (c, r, c + 1, r + 1)]}
                for r, c in (divmod(cell, side) for _, cell in where[::2])
            ]
            assert row["problem_type"] == "OCR"


def test_a_slip_reads_the_next_cell_and_goes_on_from_it() -> None:
    for index in range(20):
        chain = make_cell_chain(3, "test", 3, index)
        for look in range(4):
            words, answer = thought(chain, np.arange(4) == look)
            named = CELL.findall(words)
            assert named[-1].replace(" ", "") == answer != thought(chain)[1]
            for n, (name, following) in enumerate(pairwise(named)):
                seen = (chain.names.index(name) + (n == look)) % 9
                assert following == CELL_NAMES[chain.numbers[seen]]
    right, wrong = (
        f"<think>{words}</think><answer>{answer}</answer>"
        for words, answer in (thought(chain), thought(chain, np.arange(4) == 2))
    )
    scores = judge([right, wrong], [right] * 2, [thought(chain)[1]] * 2, "think")
    assert scores.looks == (1.0, 1.0, 0.5, 0.5) and scores.formed == 1.0


def test_chains_of_cells_do_not_depend_on_looks_and_are_refused() -> None:
    chain = make_cell_chain(4, "train", 3, 5, 2)
    again = make_cell_chain(4, "train", 3, 5, (4, 6))
    assert (draw(chain, "train") == draw(again, "train")).all() and again.looks in (4, 6)
    for side, looks in ((2, 4), (9, 4), (3, 0)):
        with pytest.raises(ValueError, match="make_cell_chain: looks must be"):
            make_cell_chain(side, "train", 0, 0, looks)


def test_practice_shows_each_cell_its_name_and_pointer(monkeypatch: Any) -> None:
    monkeypatch.setattr(start, "ROWS", 6)
    processor = make_processor(make_tokenizer(CELL_WORDS))
    model = make_model(tokenizer=processor.tokenizer)
    shown: list[Any] = []

    def noted(names: Any, numbers: Any, *rest: Any) -> Any:
        shown.extend(zip(names, numbers, strict=True))
        return lay_out(names, numbers, *rest)

    monkeypatch.setattr(start, "lay_out", noted)
    for rows in start.encode_chains(model, processor, (3, 4), 2, "think", 0, 1.0, "chain_cells"):
        assert rows.features.shape == (80 * 80, 1, 64) and rows.times is not None
        assert rows.visual_tokens == rows.times.shape[1] == rows.pictures.shape[1]
        assert rows.looks is not None
        tokens, wanted = rows.looks
        decode = processor.tokenizer.decode
        for row in range(6):
            names = [decode([token]) for token in rows.times[row]]
            cells = [shown[picture] for picture in rows.pictures[row]]
            assert names == [CELL_NAMES[name].replace(" ", "") for name, _ in cells]
            for ids, slip in ((rows.right[row], 0), (rows.wrong[row], 1)):
                said = [name.replace(" ", "") for name in CELL.findall(decode(ids))]
                for name, following in pairwise(said):
                    _, number = cells[(names.index(name) + slip) % len(names)]
                    assert CELL_NAMES[number].replace(" ", "") == following
            assert tokens.tolist() == [2, 3, 4, 5]
            path = [name.replace(" ", "") for name in CELL.findall(decode(rows.right[row]))]
            assert [decode([token]) for token in wanted[row]] == [path[0]] * 2 + [path[1]] * 2


@pytest.mark.parametrize("frames, looks", [(5, 4), (101, 4), (8, 0), (8, ())])
def test_refusals(frames: int, looks: Any) -> None:
    with pytest.raises(ValueError, match="make_chain: looks must be"):
        make_chain(frames, "train", 0, 0, looks)


def test_a_slip_reads_the_next_frame_and_goes_on_from_it() -> None:
    slips = np.array([False, True, False, True])
    for chain in _chains():
        assert chain.times is not None
        times = chain.times.tolist()
        right, wrong = (LOOK.findall(thought(chain, given)[0]) for given in (None, slips))
        assert right[0] == wrong[0] and right[1:] != wrong[1:]
        for path, slipped in ((right, np.zeros(4, bool)), (wrong, slips)):
            named = [int(time) for time, _, _ in path]
            read = [int(tens + units) for _, tens, units in path]
            assert named[1:] == read[:-1]
            for time, number, is_wrong in zip(named, read, slipped, strict=True):
                frame = (times.index(time) + is_wrong) % len(times)
                assert chain.numbers[frame] == number
        assert thought(chain)[1] == f"{chain.seconds[-1]}s" == f"{read_last(right)}s"
        assert thought(chain, slips)[1] == f"{read_last(wrong)}s"


def test_one_wrong_look_makes_the_answer_wrong() -> None:
    for chain in _chains():
        for slips in np.eye(4, dtype=bool):
            assert thought(chain, slips)[1] != thought(chain)[1]


def read_last(path: list[tuple[str, str, str]]) -> int:
    return int(path[-1][1] + path[-1][2])


def test_each_look_is_at_its_own_tokens() -> None:
    """After the tokens that `looks_of` names come the digits of the frame that it names."""
    tokenizer = make_tokenizer(WORDS)
    for looks in (2, 4):
        rows = make_dataset("chain", size=4, frames=8, looks=looks, seed=3)
        for index, row in enumerate(rows):
            said = row["completion"][0]["content"]
            ids = tokenizer(said)["input_ids"]
            assert tokenizer.decode(ids) == said and len(ids) == 3 * looks + 5
            assert len(ids) < longest("chain", looks)
            chain = puzzle_of("chain", 8, "train", 3, index, looks)
            assert isinstance(chain, Chain)
            where = looks_of(chain, "think")
            assert [{"image": frame} for _, frame in where[::2]] == row["evidence"]
            for half, colour in enumerate((TENS, UNITS)):
                for token, frame in where[half::2]:
                    digit = tokenizer.decode(ids[token + 1 : token + 2])
                    assert digit == f" {chain.read(colour)[frame]}"
            assert looks_of(chain, "direct") == [(0, where[-1][1])]


@pytest.mark.parametrize("task, token", [("cell", 0), ("timestamp", 1)])
def test_one_look_is_before_the_digit(task: Any, token: int) -> None:
    tokenizer = make_tokenizer()
    for style, at in (("think", 3), ("direct", token)):
        row = make_dataset(task, size=1, grid=3, frames=4, style=style)[0]  # type: ignore[arg-type]
        puzzle = puzzle_of(task, 3 if task == "cell" else 4, "train", 0, 0)
        ids = tokenizer(row["completion"][0]["content"])["input_ids"]
        ((found, place),) = looks_of(puzzle, style)  # type: ignore[arg-type]
        digits = puzzle.digits[:, puzzle.cell] if task == "timestamp" else puzzle.digits[0]
        assert found == at and tokenizer.decode(ids[at + 1]).strip() == str(digits[place])


def test_a_prompt_has_a_token_a_word_and_a_tile() -> None:
    processor = make_processor(make_tokenizer(WORDS))
    row = make_dataset("chain", size=1, frames=8, seed=3)[0]
    chain = puzzle_of("chain", 8, "train", 3, 0)
    text = processor.apply_chat_template(row["prompt"], add_generation_prompt=True, tokenize=False)
    ids = processor(text=[text], images=[row["images"]])["input_ids"][0]
    words = [processor.tokenizer.decode([token]) for token in ids]
    assert words.count(IMAGE) == 4 * 8
    assert isinstance(chain, Chain) and chain.times is not None
    assert [word for word in words if word in WORDS and word.endswith("s")] == [
        *(f" {time}s" for time in chain.times), f" {chain.times[chain.path[0]]}s", " times"
    ]  # fmt: skip
    assert len(words) == 2 + 8 * (1 + 2 + 4) + 13 + 4


def test_rewards_and_judgement() -> None:
    rows = list(make_dataset("chain", size=8, frames=8))
    slipped = []
    for index, row in enumerate(rows):
        wrong, answer = thought(
            make_chain(8, "train", 0, index), np.array([True, False, False, False])
        )
        said = f"<think>{wrong}</think><answer>{answer}</answer>"
        slipped.append({**row, "completion": [{"role": "assistant", "content": said}]})
    columns = [[row[name] for row in rows] for name in ("solution", "problem_type")]
    reward = combined_reward("think")
    (best,) = {*reward([row["completion"] for row in rows], *columns)}
    (form,) = {*reward([row["completion"] for row in slipped], *columns)}  # the form alone
    assert 0 < form < best
    assert reward([[{"role": "assistant", "content": "17s"}]], *[c[:1] for c in columns]) == [0.0]

    right = [row["completion"][0]["content"] for row in rows]
    other = [row["completion"][0]["content"] for row in slipped]
    assert judge(right, right, columns[0], "think").looks == (1.0,) * 4
    scores = judge(right[:6] + other[6:], right, columns[0], "think")
    assert scores.looks == (0.75,) * 4 and scores.grounded == scores.right == 0.75
    unfinished = [" ".join(right[0].split(" ")[:8]), *right[1:4]]  # two looks and a time
    scores = judge(unfinished, right[:4], columns[0][:4], "think")
    assert scores.looks == (1.0, 1.0, 0.75, 0.75) and scores.formed == 0.75


def test_practice_shows_each_frame_a_picture_of_its_number(monkeypatch: Any) -> None:
    for name, value in (("CELLS", 800), ("ROWS", 6)):
        monkeypatch.setattr(start, name, value)
    processor = make_processor(make_tokenizer(WORDS))
    model = make_model(tokenizer=processor.tokenizer)
    (rows, _) = start.encode_chains(model, processor, (6, 8), 2, "think", 0, 1.0)
    assert rows.features.shape == (200, 4, 64) and rows.pictures.shape == (6, 6)
    assert rows.visual_tokens == 24 and rows.times is not None
    bank = [make_chain(SECONDS, "train", 1_000_000, number) for number in range(2)]
    shown = np.concatenate([chain.numbers for chain in bank])[rows.pictures.numpy()]
    decode = processor.tokenizer.decode
    for row in range(6):
        times = [int(decode([token]).strip(" s")) for token in rows.times[row]]
        for ids, slip in ((rows.right[row], 0), (rows.wrong[row], 1)):
            path = LOOK.findall(decode(ids))
            assert len(path) == 2
            for time, tens, units in path:
                frame = (times.index(int(time)) + slip) % 6
                assert shown[row][frame] == int(tens + units)
