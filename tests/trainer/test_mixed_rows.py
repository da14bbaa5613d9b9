"""Rows without images beside rows with them: each has the loss that it has alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import SFTConfig

from ral.data import DataError, load_jsonl
from ral.evaluation import answers_of
from ral.models import load_model, load_processor
from ral.sft import sft_trainer
from ral.vision import blank_for, image_lists
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, cli_case, fake_vllm, tiny
from .test_gradient import outcomes

IMAGES = (1, 0, 2, 0)  # of each prompt
VIEWS = {
    "token": {},
    "visual_token": {"attn_scope": "visual"},
    "image": {"attn_granularity": "image"},
    "visual_image": {"attn_granularity": "image", "attn_scope": "visual"},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.getbasetemp() / "checkpoints"
    return {family: tiny.checkpoint(folder, family) for family in ("qwen2_5_vl", "qwen3_vl")}


def mixed(empty: Any = None, column: str = "images") -> Dataset:
    """Prompts with the numbers of images of IMAGES; `empty` in place of none."""
    pictures = tiny.dataset(4, images=2)
    rows = []
    for row, count in zip(pictures, IMAGES, strict=True):
        row["prompt"][0]["content"] += " Look at it again." * count
        images = row.pop("images")[:count] or empty
        row[column] = images and images[0] if column == "image" else images
        rows.append(row)
    return Dataset.from_list(rows)


def alone(inputs: dict[str, Any], row: int) -> dict[str, Any]:
    """One rollout as a micro-batch, cut as TRL cuts it: without images, tensors of no rows."""
    images = torch.tensor(inputs["num_images"])
    first, last = int(images[:row].sum()), int(images[: row + 1].sum())
    patches = [0, *inputs["image_grid_thw"].prod(-1).cumsum(0).tolist()]
    part = {
        name: x[row : row + 1] if isinstance(x, list) or x.dim() > 0 else x
        for name, x in inputs.items()
    }
    part["image_grid_thw"] = inputs["image_grid_thw"][first:last]
    part["pixel_values"] = inputs["pixel_values"][patches[first] : patches[last]]
    return part


def policies(trainer: Any, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """[1, C, n] of each rollout by itself, from full maps; without images where it has none."""
    found = []
    for row in range(len(inputs["num_images"])):
        part = alone(inputs, row)
        visual = part["mm_token_type_ids"] == 1
        if part["num_images"] == [0]:
            part = {name: x for name, x in part.items() if name not in by_hand.FIELDS}
        groups = outcomes(part, visual, trainer.args.attn_granularity, trainer.args.attn_scope)
        found.append(by_hand.policies(trainer.model, part, [-1], groups=groups)[0])
    return found


slow = pytest.mark.slow(stands_in="test_a_row_has_the_loss_that_it_has_alone")


@pytest.mark.parametrize(
    "view, family",
    [
        ("image", "qwen2_5_vl"),
        pytest.param("image", "qwen3_vl", marks=slow),
        pytest.param("token", "qwen2_5_vl", marks=slow),
        pytest.param("visual_token", "qwen3_vl", marks=slow),
        pytest.param("visual_image", "qwen2_5_vl", marks=slow),
    ],
)
def test_a_row_has_the_loss_that_it_has_alone(
    view: str, family: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    trainer = tiny.trainer(
        paths[family], tmp_path, train_dataset=mixed(), per_device_train_batch_size=8,
        steps_per_generation=1, num_generations=2, attn_coef=3.0, **VIEWS[view],
    )  # fmt: skip
    inputs = by_hand.batch_of(trainer)
    assert sorted(inputs["num_images"]) == sorted(2 * IMAGES)
    before = by_hand.stepped(trainer)
    rows = range(8)

    trainer.args.rl_coef = 0.0
    with torch.no_grad(), by_hand.weights(trainer.model, before):
        r = policies(trainer, inputs)
    with by_hand.weights(trainer.model, None):
        p = policies(trainer, inputs)
    divergences = torch.cat([by_hand.divergence(*pair) for pair in zip(p, r, strict=True)])
    weighted = inputs["advantages"][:, None] * divergences
    wanted = gradients(trainer.model, 3 * by_hand.response_mean(weighted, inputs))
    loss = trainer._compute_loss(trainer.model, inputs)
    torch.testing.assert_close(
        loss.detach(), 3 * by_hand.response_mean(weighted, inputs).detach(), rtol=2e-4, atol=1e-6
    )
    assert_same_gradients(gradients(trainer.model, loss), wanted, 5e-4)
    text = divergences[[count == 0 for count in inputs["num_images"]]]
    # A text row has one span, or no visual key: nothing to compare. All its tokens differ.
    assert (text.mean() > 1e-4) == (view == "token")

    trainer.args.rl_coef = 1.0
    together = trainer._compute_loss(trainer.model, inputs)
    wanted = gradients(trainer.model, together)
    trainer.args.steps_per_generation = trainer.current_gradient_accumulation_steps = 8
    losses = [trainer._compute_loss(trainer.model, alone(inputs, row)) for row in rows]
    torch.testing.assert_close(torch.stack(losses).sum(), together, rtol=1e-4, atol=1e-6)
    assert_same_gradients(gradients(trainer.model, torch.stack(losses).sum()), wanted, 1e-4)


@slow
@pytest.mark.parametrize("attn_reference", ["old", "ref"])
def test_micro_batches_with_images_and_without(
    attn_reference: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    """Micro-batches of one prompt: in the order of the data, one with images, one without."""
    trainer = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, train_dataset=mixed(), num_generations=2,
        per_device_train_batch_size=2, steps_per_generation=4, attn_reference=attn_reference,
        beta=0.1, attn_granularity="image",
    )  # fmt: skip
    sizes: list[int] = []

    def see(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            pixels = kwargs.get("pixel_values")
            sizes.append(0 if pixels is None else len(pixels))

    trainer.model.register_forward_pre_hook(see, with_kwargs=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", lambda batch: batch)
        trainer.train()
    assert sorted(count > 0 for count in sizes) == [False, False, True, True]
    assert len(tiny.logged(trainer, "loss")) == 4
    assert 0 < tiny.logged(trainer, "attn/visual_share")[0] < 1


@slow
@pytest.mark.parametrize(
    "empty, column", [(None, "images"), ([], "images"), (None, "image")], ids=str
)
def test_forms_of_no_image_are_one(
    empty: Any, column: str, paths: dict[str, Path], tmp_path: Path
) -> None:
    """None, an empty list and a column of single images give the same rollouts and losses."""

    def losses(name: str, rows: Dataset) -> list[float]:
        trainer = tiny.trainer(
            paths["qwen2_5_vl"], tmp_path / name, train_dataset=rows, max_steps=2
        )
        trainer.train()
        return tiny.logged(trainer, "loss")

    def single(rows: Dataset) -> Dataset:
        return rows.select([0, 1])

    wanted = losses("wanted", single(mixed([])))
    assert losses("got", single(mixed(empty, column))) == wanted


@slow
@pytest.mark.parametrize("empty", [None, []], ids=str)
def test_a_column_that_is_empty_in_every_row(
    empty: Any, paths: dict[str, Path], tmp_path: Path
) -> None:
    """Losses are those of a dataset without the column; spans have nothing to compare."""

    def train(name: str, rows: Dataset, **config: Any) -> Any:
        trainer = tiny.trainer(
            paths["qwen2_5_vl"], tmp_path / name, train_dataset=rows, max_steps=2, **config
        )
        trainer.train()
        return trainer

    text = tiny.dataset(4).remove_columns("images")
    column = text.add_column("images", [empty] * 4)
    wanted = tiny.logged(train("1", text), "loss")
    assert tiny.logged(train("2", column), "loss") == wanted
    spans = train("3", column, attn_granularity="frame")
    assert tiny.logged(spans, "attn/loss") == pytest.approx([0.0, 0.0], abs=1e-12)


def test_image_lists() -> None:
    rows = [{"images": None, "a": 1}, {"images": ["x"]}, {"image": "y"}, {"image": None}, {}]
    assert [row["images"] for row in image_lists(rows)] == [[], ["x"], ["y"], [], []]
    assert image_lists([{"a": 1}]) == [{"a": 1}]


@slow
def test_sft(paths: dict[str, Path], tmp_path: Path) -> None:
    """The loss of a mixed batch is the mean over the tokens of its rows alone."""
    rows = [
        {**row, "completion": [{"role": "assistant", "content": "the cat " * (number + 1)}]}
        for number, row in enumerate(mixed())
    ]
    config = SFTConfig(
        output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to=[],
        per_device_train_batch_size=4, gradient_checkpointing=False, max_steps=1,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    model, processor = load_model(paths["qwen2_5_vl"]), load_processor(paths["qwen2_5_vl"])
    trainer = sft_trainer(model, processor, Dataset.from_list(rows), config)
    batch = trainer.data_collator([dict(row) for row in rows])
    assert batch["image_grid_thw"].shape[0] == sum(IMAGES)

    def loss(batch: Any) -> tuple[float, int]:
        with torch.no_grad():
            value = model(**{name: batch[name] for name in batch}).loss
        return value.item(), int((batch["labels"][:, 1:] != -100).sum())

    parts = [loss(trainer.data_collator([dict(row)])) for row in rows]
    whole, tokens = loss(batch)
    assert tokens == sum(count for _, count in parts)
    assert whole == pytest.approx(sum(value * n for value, n in parts) / tokens, rel=1e-5)
    trainer.train()


@pytest.mark.slow(stands_in="test_rows_of_a_file")
@pytest.mark.parametrize("which", ["rl", "sft"])
def test_a_blank_image_gives_the_encoder_gradients_of_zero(
    which: str, paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What several processes do for a forward without images: its loss and gradients stay."""
    text = tiny.dataset(2).remove_columns("images")
    model, processor = load_model(paths["qwen2_5_vl"]), load_processor(paths["qwen2_5_vl"])
    trainer: Any
    if which == "rl":
        trainer = tiny.trainer(paths["qwen2_5_vl"], tmp_path, train_dataset=text)
        inputs = by_hand.batch_of(trainer)
    else:
        config = SFTConfig(
            output_dir=str(tmp_path), max_length=None, use_cpu=True, bf16=False, report_to=[]
        )
        answers = text.add_column(
            "completion", [[{"role": "assistant", "content": "the cat"}]] * 2
        ).add_column("images", [[], []])
        trainer = sft_trainer(model, processor, answers, config)
        inputs = trainer.data_collator([dict(row) for row in answers])
    assert trainer._blank is None
    found = []
    for processes in (1, 2):
        monkeypatch.setattr(type(trainer.accelerator), "num_processes", processes)
        blank = blank_for(trainer)
        monkeypatch.undo()
        assert (blank is None) == (processes == 1)
        trainer._blank = blank
        loss = trainer.compute_loss(trainer.model, dict(inputs))
        trainer.model.zero_grad()
        loss.backward()
        found.append((loss, {n: x.grad for n, x in trainer.model.named_parameters()}))
    (loss, without), (again, with_blank) = found
    assert torch.equal(loss, again)
    for name, gradient in with_blank.items():
        if "visual" in name:
            assert without[name] is None and not gradient.any(), name
        else:
            torch.testing.assert_close(gradient, without[name], rtol=0, atol=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = cli_case.make(tmp_path_factory.mktemp("case"))
    rows = [json.loads(line) for line in (made / "rows.jsonl").read_text("utf-8").splitlines()]
    for row in rows[1::2]:
        row["data_type"] = "text"
        del row["path"]
    (made / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return made


@pytest.mark.parametrize("streaming", [False, True])
def test_rows_of_a_file(streaming: bool, folder: Path) -> None:
    rows = list(load_jsonl(folder / "mixed.jsonl", streaming=streaming))
    assert [len(row["images"]) for row in rows] == [1, 0] * 4
    parts = [[part["type"] for part in row["prompt"][0]["content"]] for row in rows]
    assert parts == [["image", "text"], ["text"]] * 4


def test_a_text_row_has_no_path(tmp_path: Path) -> None:
    line = {"problem": "2 + 2?", "data_type": "text", "problem_type": "numerical", "solution": 4}
    (tmp_path / "rows.jsonl").write_text(json.dumps(line | {"path": "a.png"}), "utf-8")
    with pytest.raises(DataError, match="path must be left out of a row with data_type 'text'"):
        load_jsonl(tmp_path / "rows.jsonl")


@pytest.mark.slow(stands_in="test_rows_of_a_file")
def test_answers_do_not_depend_on_the_batch(folder: Path) -> None:
    model, processor = (
        load_model(folder / "qwen2_5_vl").eval(),
        load_processor(folder / "qwen2_5_vl"),
    )
    rows = [dict(row) for row in load_jsonl(folder / "mixed.jsonl").select(range(4))]
    rows[3]["images"] = None
    together, tokens = answers_of(model, processor, rows, max_new_tokens=5)
    alone = [answers_of(model, processor, [row], max_new_tokens=5)[0][0] for row in rows]
    assert together == alone and tokens == 12


@slow
def test_vllm(paths: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads each prompt as the trainer does, with images and without; so do further prompts."""
    fake_vllm.install(monkeypatch)
    rewarded: list[int] = []

    def reward(completions: Any, problem_id: Any, **columns: Any) -> list[float]:
        rewarded.append(len(completions))
        values = tiny.reward(completions)
        return [x if n in "12" else 0.0 for n, x in zip(problem_id, values, strict=True)]

    trainer: Any = tiny.trainer(
        paths["qwen2_5_vl"], tmp_path, train_dataset=mixed(), reward_funcs=reward, use_vllm=True,
        vllm_mode="colocate", resample_equal_groups=3, eval_dataset=mixed(), eval_temperature=1e-3,
        num_generations_eval=1, max_steps=1,
    )  # fmt: skip
    trainer.train()  # or `vllm_min_ratio` stops it
    engine = trainer.vllm_generation
    assert len(engine.llm.lengths) == sum(rewarded)
    assert tiny.logged(trainer, "groups/left_equal") == [0]
    ratios = tiny.logged(trainer, "sampling/importance_sampling_ratio/mean")
    assert 0.9 < ratios[0] < 1.1  # of a response: tokens that are kept out take 1 % of each of 8

    def answers() -> list[str]:
        trainer.evaluate()
        (file,) = (Path(trainer.args.output_dir) / "evaluations").iterdir()
        return [json.loads(line)["answer"] for line in file.read_text("utf-8").splitlines()]

    assert answers() == answers()  # as good as greedy
    assert engine.temperature == trainer.temperature == 1.0
