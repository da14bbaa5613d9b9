"""The supervised start of the tiny model, in about a minute of one core.

1. The vision tower learns to tell digit and colour of single cells, and is frozen.
2. The language model learns demonstrations on features of pictures that are computed once.
   Times and questions are drawn again for the same pictures, or it memorises the rows.
3. If `wrong_share` asks for it, the last demonstrations are wrong in one systematic way. So
   reinforcement learning has something to unlearn, and groups of rollouts have a spread of rewards.

Looking up *when* a colour is seen takes two steps of attention: tile to time, and colour to tile.
From answers alone the model learns it late or never, because copying any time is a plateau. Two
dense losses help while the demonstrations are right. Image tokens after the first layer name the
time of their frame, and the position that names the time also names the digit. Chains need only the
first: their thoughts spell digits. A picture of theirs depends on the number in it alone, so the
same pictures make new chains. Cells have names of two words, which a thought spells. There, tokens
that look name the cell after the first layer; without that, few looks were right after 900 steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from .chains import (
    CELL_ANSWERS,
    CELL_NAMES,
    CELL_WORDS,
    LOOKS,
    WORDS,
    CellChain,
    Chain,
    lay_out,
    make_chain,
)
from .evaluate import Accuracy, evaluate
from .model import END, IMAGE, make_model, make_processor, make_tokenizer, save_start
from .puzzles import NAMES, SECONDS, TILES, Puzzle, Task, draw, make_puzzle
from .scans import load_scans
from .tasks import NOISE, Style, demonstration, looks_of, prompt, puzzle_of, response

EXTENTS: dict[Task, tuple[int, ...]] = {
    "cell": (1, 2, 3, 4, 6, 8),
    "timestamp": (2, 4, 8, 16, 32, 64),
    "chain": (6, 8, 16, 32),
    "chain_cells": (3, 4, 6, 8),
}
WORDS_OF: dict[Task, tuple[str, ...]] = {"chain": WORDS, "chain_cells": CELL_WORDS}
STEPS: dict[Task, int] = {"cell": 900, "timestamp": 900, "chain": 1200, "chain_cells": 300}
SHORT = 36  # visual tokens; longer rows come less often, to keep the form at any length
TYPICAL: dict[Task, int] = {"cell": 3, "timestamp": 8, "chain": 8, "chain_cells": 4}
VISION_STEPS, VISION_BATCH = 100, 256
CELLS = 8192  # drawn for each extent
ROWS = 4096  # questions about them
BANK_SIDE = 4  # of the pictures in which cells of chains are drawn; its square divides 80 · 80
NAMED = 1  # token of a completion, after its first tag, that names the time or colour
PRACTICE_SHARE = 0.75  # of the steps, before those with wrong demonstrations

Log = Callable[[str], None]


@dataclass(frozen=True)
class Start:
    """The result of `train_start`.

    Attributes:
        folder: the checkpoint.
        losses: mean loss of a completion's token, step by step.
        greedy, sampled: accuracy on held-out scans, greedy and at temperature 0.9.
        seconds: all of it, evaluation included.
    """

    folder: Path
    losses: list[float] = field(repr=False)
    greedy: Accuracy
    sampled: Accuracy
    seconds: float


@dataclass(frozen=True)
class _Rows:
    """Puzzles of one extent, ready for the language model.

    Attributes:
        prompts: [N, P] token ids; right, wrong: [N, C] completions; both int64.
        digits: [N] token ids of the right digits; None where thoughts spell them.
        times: [N, frames] token ids, or of cells' names; None without either.
        looks: which tokens of right completions look, and [N, tokens] ids of the names of the cells
            that they look at; None where a name is one token.
        pictures: [N] which features a row has, or [N, frames] of several pictures each.
        features: [pictures, image tokens, hidden_size] float32.
        positions: [3, 1, P + C], the same for all rows.
    """

    prompts: torch.Tensor
    right: torch.Tensor
    wrong: torch.Tensor
    digits: torch.Tensor | None
    times: torch.Tensor | None
    looks: tuple[torch.Tensor, torch.Tensor] | None
    pictures: torch.Tensor
    features: torch.Tensor
    positions: torch.Tensor

    @property
    def visual_tokens(self) -> int:
        return self.features[self.pictures[0]][..., 0].numel()


def train_start(
    folder: str | Path,
    task: Task = "timestamp",
    *,
    style: Style = "think",
    steps: int | None = None,
    wrong_share: float = 0.5,
    seed: int = 0,
    extents: Sequence[int] | None = None,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    looks: int | tuple[int, ...] = LOOKS,
    log: Log | None = print,
    **model_options: Any,
) -> Start:
    """Train the tiny model on demonstrations and write it to a folder.

    The same arguments give the same weights on the same machine and number of threads; one
    thread is the fastest. It trains on torch's default device.

    Args:
        folder: of the checkpoint, as `save_start` writes it.
        task, style: as in `make_dataset`.
        steps: of the language model, by default `STEPS`; the vision tower takes 100 small ones
            before.
        wrong_share: of the last quarter of the steps' demonstrations, those that answer for the
            last cell or frame, or of a chain's looks, as in `make_dataset`; 0 for an unbiased
            start.
        seed: of weights, puzzles and batches.
        extents: grid sides or frames to train on, by default `EXTENTS`, the long ones seldom.
        batch_size, learning_rate: of the language model's steps.
        looks: of chains.
        log: gets a line now and then; None for silence.
        model_options: of `make_model`.

    Raises:
        ValueError: steps or wrong_share is out of its range.
    """
    steps = STEPS[task] if steps is None else steps
    if steps < 1:
        raise ValueError(f"train_start: steps must be at least 1; got {steps}")
    if not 0 <= wrong_share <= 1:
        raise ValueError(f"train_start: wrong_share must be within 0..1; got {wrong_share}")
    say = log or (lambda line: None)
    began = time.perf_counter()
    extents = EXTENTS[task] if extents is None else tuple(extents)
    processor = make_processor(make_tokenizer(WORDS_OF.get(task, ())))
    model = make_model(seed=seed, tokenizer=processor.tokenizer, **model_options)
    model = model.to(torch.get_default_device()).train()
    train_vision(model, processor, task, seed=seed, log=say)
    if task in WORDS_OF:
        pools = encode_chains(model, processor, extents, looks, style, seed, wrong_share, task)
    else:
        pools = [encode(model, processor, task, extent, style, seed) for extent in extents]
    say(f"start: {time.perf_counter() - began:.0f} s, vision tower trained, pictures encoded")
    losses = []
    for step, loss in enumerate(
        _fit(
            model,
            pools,
            steps,
            1.0 if task in WORDS_OF else wrong_share,
            seed,
            batch_size,
            learning_rate,
        )
    ):
        losses.append(loss)
        if (step + 1) % 50 == 0:
            recent = float(np.mean(losses[-50:]))
            say(
                f"start: {time.perf_counter() - began:.0f} s, step {step + 1}/{steps}, "
                f"loss {recent:.3f}"
            )
    model.requires_grad_(True).eval()
    save_start(folder, model, processor)
    extent = TYPICAL[task] if TYPICAL[task] in extents else extents[-1]
    options: dict[str, Any] = {
        "task": task, "style": style, "extents": (extent,), "size": 256, "processor": processor,
        "looks": looks,
    }  # fmt: skip
    greedy = evaluate(model, **options)[extent]
    sampled = evaluate(model, temperature=0.9, seed=seed, **options)[extent]
    seconds = time.perf_counter() - began
    say(
        f"start: {seconds:.0f} s, held-out accuracy at {extent}: {greedy.right:.2f} greedy, "
        f"{sampled.right:.2f} at temperature 0.9"
    )
    return Start(Path(folder), losses, greedy, sampled, seconds)


def train_vision(
    model: Any,
    processor: Any,
    task: Task,
    *,
    seed: int = 0,
    steps: int = VISION_STEPS,
    log: Log = print,
) -> float:
    """Train the vision tower to tell digits and colours of single cells.

    Returns:
        the share of digits that were right in the last batch.
    """
    rng = np.random.default_rng([seed, 1])
    scans = load_scans("train")
    count = 4096
    tiles = 2 if task == "chain_cells" else 1
    chosen = rng.integers(len(scans.ids), size=(count, tiles))
    colours = rng.integers(-1, len(NAMES), size=(count, tiles))
    cells = Puzzle(chosen, scans.digits[chosen], colours, None, 0, 0, int(rng.integers(1 << 31)))
    pixels, grids = _pixels(processor, draw(cells, "train", NOISE[task]), model.device)
    digits = torch.from_numpy(cells.digits).to(model.device)
    names = torch.from_numpy(colours + 1).to(model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        told_of_tile = 10 + 1 + len(NAMES)
        head = torch.nn.Linear(model.config.text_config.hidden_size, tiles * told_of_tile)
    tower = model.model.visual
    optimizer = torch.optim.AdamW([*tower.parameters(), *head.parameters()], weight_decay=0.05)
    right = 0.0
    for step in range(steps):
        _set_rate(optimizer, 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps))
        rows = torch.from_numpy(rng.integers(count, size=VISION_BATCH)).to(model.device)
        told = head(tower(pixels[rows].flatten(0, 1), grid_thw=grids[rows]).pooler_output)
        told = told.view(-1, told_of_tile)
        digit, name = digits[rows].flatten(), names[rows].flatten()
        loss = cross_entropy(told[:, :10], digit) + cross_entropy(told[:, 10:], name)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        right = (told[:, :10].argmax(1) == digit).float().mean().item()
    log(f"start: the vision tower reads {right:.0%} of the digits it is trained on")
    return right


def encode(model: Any, processor: Any, task: Task, extent: int, style: Style, seed: int) -> _Rows:
    """Draw pictures of one extent, compute their features, and ask questions about them."""
    rng = np.random.default_rng([seed, 2, extent])
    count = min(CELLS // make_puzzle(task, extent, "train", 0, 0).digits.size, ROWS // 2)
    puzzles = [make_puzzle(task, extent, "train", seed + 1_000_000, i) for i in range(count)]
    features = []
    tower = model.model.visual
    with torch.no_grad():
        for first in range(0, count, 64):
            frames = [draw(p, "train", NOISE[task]) for p in puzzles[first : first + 64]]
            pixels, grids = _pixels(processor, np.concatenate(frames), model.device)
            seen = tower(pixels.flatten(0, 1), grid_thw=grids).pooler_output
            features.append(seen.view(len(frames), -1, seen.shape[-1]))
    cells = features[0].shape[1] // len(frames[0])
    asked = [_ask(puzzles[row % count], rng) for row in range(ROWS)]
    right = [response(p, style, p.frame, p.cell) for p in asked]
    wrong = [response(p, style, *p.last) for p in asked]
    digit_ids = torch.tensor([_one(processor.tokenizer, str(digit)) for digit in range(10)])
    return replace(
        _rows(model, processor, style, asked, right, wrong, grids[: len(frames[0])], cells),
        digits=digit_ids[torch.tensor([p.digits[p.frame, p.cell] for p in asked])],
        pictures=torch.arange(len(asked)) % count,
        features=torch.cat(features),
    )


def encode_chains(
    model: Any,
    processor: Any,
    extents: Sequence[int],
    looks: int | tuple[int, ...],
    style: Style,
    seed: int,
    wrong_share: float,
    task: Task = "chain",
) -> list[_Rows]:
    """Draw what frames or cells can show, compute their features, and make chains of them.

    A picture depends on what it shows, and on nothing else of its chain. So the chains of all
    extents and looks are of the same pictures, each time in another order.
    """
    rng = np.random.default_rng([seed, 2])
    of_cells = task == "chain_cells"
    features, where = (_cell_bank if of_cells else _frame_bank)(model, processor, seed)
    pools = []
    for extent in extents:
        for of_row in (looks,) if isinstance(looks, int) else looks:
            asked: Any = [puzzle_of(task, extent, "train", seed + 2_000_000, row, of_row)
                          for row in range(ROWS)]  # fmt: skip
            right, wrong = (
                [demonstration(chain, style, share, rng) for chain in asked]
                for share in (0.0, wrong_share)
            )
            shown = np.stack([chain.shown for chain in asked])
            pictures = torch.from_numpy(where[rng.integers(len(where), size=shown.shape), shown])
            pictures = pictures.to(model.device)
            side = 2 * (extent if of_cells else TILES)  # in patches
            grids = torch.tensor([[1, side, side]] * (1 if of_cells else extent))
            tokens = extent**2 if of_cells else features.shape[1]
            made = _rows(model, processor, style, asked, right, wrong, grids, tokens)
            pools.append(replace(made, pictures=pictures, features=features))
    return pools


def _frame_bank(model: Any, processor: Any, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """Features [pictures, tokens, hidden_size] of frames, and [k, n] which of them show n."""
    count = CELLS // (SECONDS * TILES * TILES)
    bank, where = [], np.empty((count, SECONDS), np.int64)
    for number in range(count):
        chain = make_chain(SECONDS, "train", seed + 1_000_000, number)
        where[number, chain.numbers] = number * SECONDS + np.arange(SECONDS)
        bank.append(_features(model, processor, draw(chain, "train", NOISE["chain"])))
    return torch.cat(bank), where


def _cell_bank(model: Any, processor: Any, seed: int) -> tuple[torch.Tensor, np.ndarray]:
    """As `_frame_bank`, of a cell for each name and what it shows, among others in pictures."""
    rng = np.random.default_rng([seed, 4])
    count, size = len(CELL_NAMES), BANK_SIDE**2
    order = rng.permutation(count**2).reshape(-1, size)
    bank = []
    for cells in order:
        picture = lay_out(*np.divmod(cells, count), np.arange(size), (1,), "train", rng)
        drawn = draw(picture, "train", NOISE["chain_cells"])
        bank.append(_features(model, processor, drawn).view(size, 1, -1))
    return torch.cat(bank), np.argsort(order.ravel())[None]


@torch.no_grad()
def _features(model: Any, processor: Any, frames: np.ndarray) -> torch.Tensor:
    """[frames, tokens, hidden_size], as the vision tower sees them."""
    pixels, grids = _pixels(processor, frames, model.device)
    seen: torch.Tensor = model.model.visual(pixels.flatten(0, 1), grid_thw=grids).pooler_output
    return seen.view(len(frames), -1, seen.shape[-1])


def _rows(
    model: Any,
    processor: Any,
    style: Style,
    asked: Sequence[Puzzle],
    right: list[str],
    wrong: list[str],
    grids: torch.Tensor,
    cells: int,
) -> _Rows:
    """Prompts and completions of puzzles of one extent, without their pictures.

    Args:
        grids: of a row's pictures, each of `cells` tokens.
    """
    tokenizer = processor.tokenizer
    prompts = [_prompt_text(processor, puzzle, style, cells) for puzzle in asked]
    chains: Any = asked
    times = looks = None
    if isinstance(asked[0], CellChain):
        name_ids = torch.tensor([_one(tokenizer, name) for name in CELL_ANSWERS])
        called = torch.from_numpy(np.stack([chain.called for chain in chains]))
        times = name_ids[called.to(name_ids.device)]
        seen = torch.tensor([looks_of(chain, style) for chain in asked])  # [N, tokens, 2]
        looks = seen[0, :, 0], times.gather(1, seen[..., 1])
    elif asked[0].times is not None:
        space = " " if isinstance(asked[0], Chain) else ""
        names = [f"{space}{second}s" for second in range(SECONDS)]
        time_ids = torch.tensor([_one(tokenizer, name) for name in names])
        seen = torch.from_numpy(np.stack([chain.times for chain in chains]))
        times = time_ids[seen.to(time_ids.device)]
    ids = torch.tensor(tokenizer(prompts)["input_ids"])
    completions = torch.tensor(tokenizer([text + END for text in right])["input_ids"])
    whole = torch.cat([ids[:1], completions[:1]], 1)
    positions, _ = model.model.get_rope_index(
        whole, (whole == model.config.image_token_id).int(), image_grid_thw=grids
    )
    return _Rows(
        prompts=ids,
        right=completions,
        wrong=torch.tensor(tokenizer([text + END for text in wrong])["input_ids"]),
        digits=None,
        times=times,
        looks=looks,
        pictures=torch.empty(0),
        features=torch.empty(0),
        positions=positions,
    )


def _fit(
    model: Any,
    pools: list[_Rows],
    steps: int,
    wrong_share: float,
    seed: int,
    batch_size: int,
    learning_rate: float,
) -> Iterator[float]:
    """Train the language model, and yield each step's loss."""
    rng = np.random.default_rng([seed, 3])
    model.model.visual.requires_grad_(False)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.01)
    lengths = np.array([rows.visual_tokens for rows in pools])
    shares = np.minimum(1, SHORT / lengths) / np.minimum(1, SHORT / lengths).sum()
    for step in range(steps):
        _set_rate(optimizer, learning_rate * min(1, (step + 1) / 30) * (1 - 0.8 * step / steps))
        pool = rng.choice(len(pools), p=shares)
        rows = pools[pool]
        size = min(batch_size, batch_size * 64 // int(lengths[pool]))
        chosen = torch.from_numpy(rng.integers(ROWS, size=size)).to(model.device)
        practice = step < PRACTICE_SHARE * steps
        is_wrong = torch.from_numpy(rng.random((size, 1)) < (0 if practice else wrong_share))
        is_wrong = is_wrong.to(model.device)
        completions = torch.where(is_wrong, rows.wrong[chosen], rows.right[chosen])
        loss, led = _losses(model, rows, chosen, completions)
        (loss * completions.shape[1] + (led if practice else 0)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        yield loss.item()


def _losses(
    model: Any,
    rows: _Rows,
    chosen: torch.Tensor,
    completions: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean loss of the completions' tokens, and the sum of the two dense losses."""
    ids = torch.cat([rows.prompts[chosen], completions], 1)
    is_image = ids == model.config.image_token_id
    embedded = model.get_input_embeddings()(ids)
    embedded = embedded.masked_scatter(is_image[..., None], rows.features[rows.pictures[chosen]])
    length = completions.shape[1]
    output = model(
        inputs_embeds=embedded,
        position_ids=rows.positions.expand(3, len(ids), -1),
        logits_to_keep=length + 1,
        output_hidden_states=True,
        use_cache=False,
    )
    logits = output.logits[:, :-1]
    loss = cross_entropy(logits.flatten(0, 1), completions.flatten())
    if rows.times is None:
        return loss, loss.new_zeros(())
    times = rows.times[chosen]
    first_layer = output.hidden_states[1][is_image].unflatten(0, (*times.shape, -1))
    named = model.lm_head(model.model.language_model.norm(first_layer))
    target = times[..., None].expand(named.shape[:-1])
    placed = cross_entropy(named.flatten(0, -2), target.flatten())
    if rows.looks is not None:
        tokens, wanted = rows.looks
        looking = output.hidden_states[1][:, rows.prompts.shape[1] :][:, tokens]
        said = model.lm_head(model.model.language_model.norm(looking))
        placed = placed + cross_entropy(said.flatten(0, 1), wanted[chosen].flatten())
    if rows.digits is None:
        return loss, placed
    return loss, placed + cross_entropy(logits[:, NAMED], rows.digits[chosen])


def _ask(puzzle: Puzzle, rng: np.random.Generator) -> Puzzle:
    """The same pictures with other times and another asked colour that occurs once."""
    colours = puzzle.colours.ravel()
    once = [cell for cell, c in enumerate(colours) if c >= 0 and (colours == c).sum() == 1]
    frame, cell = divmod(int(rng.choice(once)), puzzle.colours.shape[1])
    times = puzzle.times
    if times is not None:
        times = np.sort(rng.choice(SECONDS, size=len(times), replace=False))
    return replace(puzzle, times=times, frame=frame, cell=cell)


def _prompt_text(processor: Any, puzzle: Puzzle, style: Style, cells: int) -> str:
    text = processor.apply_chat_template(
        [{"role": "user", "content": prompt(puzzle, style)}],
        add_generation_prompt=True,
        tokenize=False,
    )
    return str(text).replace(IMAGE, IMAGE * cells)


def _pixels(
    processor: Any, frames: np.ndarray, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches [frames, patches, 1176] of frames of one size, and their grids [frames, 3]."""
    from PIL import Image

    made = processor.image_processor(
        images=[Image.fromarray(frame) for frame in frames], return_tensors="pt"
    ).to(device)
    return made["pixel_values"].unflatten(0, (len(frames), -1)), made["image_grid_thw"]


def _one(tokenizer: Any, word: str) -> int:
    """The one token that a word is."""
    (token,) = tokenizer(word)["input_ids"]
    return int(token)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate
