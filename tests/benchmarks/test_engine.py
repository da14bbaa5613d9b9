"""The study's engine against what it stands for: transformers' model and `ral.RALTrainer`."""

from __future__ import annotations

import operator
import zlib
from typing import Any

import pytest
import torch

from benchmarks.study import run as one
from benchmarks.study.arms import ARMS, BY_NAME, Arm
from benchmarks.study.decoder import Decoder
from benchmarks.study.engine import Engine, Rollouts, suppressed_tokens
from benchmarks.study.prompts import Prompts, Reader
from benchmarks.study.tasks import TASKS
from ral import RALConfig, RALTrainer
from ral.digits import load_pretrained
from ral.digits.model import save_start
from ral.models import load_model, load_processor

pytestmark = pytest.mark.xdist_group("study")
_STEPS = 4
_WIDE = 3.0  # temperature: responses of many lengths and forms


def _reward(completions: list[Any], **_: Any) -> list[float]:
    """One that differs within groups, whatever is written."""
    return [zlib.crc32(said[0]["content"].encode()) % 7 / 7 for said in completions]


class _Start:
    """The bundled model, its reader, and two kinds of trainer from it."""

    def __init__(self, folder: Any) -> None:
        self.folder = str(save_start(folder, *load_pretrained()))
        self.reader = Reader(load_model(self.folder, dtype="float32"), load_processor(self.folder))

    def policy(self, shift: float = 0.0) -> Any:
        """A copy with other weights, in transformers."""
        model = load_model(self.folder, dtype="float32")
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for weight in model.parameters():
                weight += shift * torch.randn(weight.shape, generator=generator)
        model.model.visual = self.reader.pictures
        return model


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> _Start:
    return _Start(tmp_path_factory.mktemp("start"))


def _config(arm: Arm, folder: Any) -> RALConfig:
    settings = {**one.settings_of(arm, TASKS["frames"]), "temperature": _WIDE}
    settings |= {"per_device_train_batch_size": 8, "num_generations": 4}
    return RALConfig(
        output_dir=str(folder), max_steps=_STEPS, use_cpu=True, bf16=False, report_to=[], seed=3,
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        attn_metrics_every=0, **settings,
    )  # fmt: skip


def _of_trainer(start: _Start, arm: Arm, config: RALConfig, rows: Any) -> tuple[Any, list[Any]]:
    """A trained RALTrainer, and of each step its minibatch, loss and clipped gradients."""
    from transformers import TrainerCallback

    teacher = start.policy(0.02) if arm.teacher else None
    trainer: Any = RALTrainer(
        start.policy(), _reward, config, train_dataset=rows,
        processing_class=start.reader.processor, teacher_model=teacher,
    )  # fmt: skip
    if trainer.ref_model is not None:
        trainer.ref_model.model.visual = start.reader.pictures
    steps: list[Any] = []
    compute = trainer._compute_loss

    def loss(model: Any, inputs: Any) -> Any:
        value = compute(model, inputs)
        weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        steps.append([dict(inputs), value.detach().clone(), {}, weights])
        return value

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            steps[-1][2] = {n: p.grad.clone() for n, p in kwargs["model"].named_parameters()}

    def write(rows_: Any) -> Any:
        output = generate(rows_)
        output.setdefault("rollout_index", torch.arange(len(output["prompt_ids"])))
        return output

    generate, trainer._generate_and_score_completions = (
        trainer._generate_and_score_completions, write,
    )  # fmt: skip
    trainer._compute_loss = loss
    trainer.add_callback(Keep())
    trainer.train()
    return trainer, steps


def _prompts(start: _Start, count: int, extents: tuple[int, ...]) -> tuple[Prompts, list[Any]]:
    return _read(start, TASKS["frames"].rows(count, extents, "train", 11, style="think"))


def _read(start: _Start, found: Any) -> tuple[Prompts, list[Any]]:
    rows = [found[number] for number in range(len(found))]
    return start.reader.encode(rows), rows


def _engine(start: _Start, arm: Arm, config: RALConfig, found: Any) -> Engine:
    prompts, rows = _read(start, found)
    policy, teacher = Decoder.of(start.policy()), Decoder.of(start.policy(0.02))
    return Engine(
        policy, config, prompts, rows, start.reader.tokenizer, _reward,
        suppressed=suppressed_tokens(start.reader.config, start.reader.processor),
        teacher=teacher if arm.teacher else None,
    )  # fmt: skip


def _rollouts(engine: Engine, steps: list[Any]) -> tuple[Rollouts, list[torch.Tensor]]:
    """The trainer's rollout batch, in its order; and of each step the rollouts it learns from."""
    parts = [inputs["rollout_index"] for inputs, *_ in steps]
    order = torch.cat(parts[:2]).argsort()
    whole = {
        name: torch.cat([inputs[name] for inputs, *_ in steps[:2]])[order]
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")
    }
    width = whole["prompt_ids"].shape[1]
    ids = engine.prompts.ids[:, -width:]
    same = (whole["prompt_ids"][:, None] == ids[None]).all(-1)
    prompt = same.long().argmax(-1)  # of equal prompts, pictures differ: none are equal here
    assert same.sum(-1).eq(1).all()
    inputs = {"rollout_index": torch.arange(len(prompt))}
    if "explore_bias" in steps[0][0]:
        bias = torch.cat([inputs_["explore_bias"] for inputs_, *_ in steps[:2]])[order]
        inputs["explore_bias"] = bias
    return (
        Rollouts(prompt, width, whole["completion_ids"], whole["completion_mask"].bool(), inputs),
        parts,
    )


_KINDS = ("grpo", "ral", "explore", "opad", "sum")  # one of each kind of term
_REST = [
    arm.name
    for arm in ARMS
    if "frames" in arm.tasks and arm.control in (None, "flipped") and arm.name not in _KINDS
]


@pytest.mark.parametrize("name", _KINDS)
def test_steps_are_those_of_the_trainer(name, start, tmp_path) -> None:
    """Loss, every gradient and the weights after it, in all optimizer steps on a batch."""
    _compare(start, BY_NAME[name], tmp_path)


@pytest.mark.slow(stands_in="test_steps_are_those_of_the_trainer")
@pytest.mark.parametrize("name", _REST)
def test_steps_of_other_arms_are_those_of_the_trainer(name, start, tmp_path) -> None:
    _compare(start, BY_NAME[name], tmp_path)


def _compare(start: _Start, arm: Arm, folder: Any) -> None:
    rows = TASKS["frames"].rows(4, (2, 3, 8), "train", 11, style="think")
    config = _config(arm, folder)
    trainer, steps = _of_trainer(start, arm, config, rows)
    engine = _engine(start, arm, config, rows)
    suppressed = engine._allowed.isinf().nonzero()[:, 0].tolist()
    assert suppressed == trainer.generation_config.suppress_tokens
    rollouts, parts = _rollouts(engine, steps)
    lengths = rollouts.mask.sum(-1)
    assert lengths.min() < lengths.max() and not engine.prompts.mask.all()
    rollouts = engine.score(rollouts)
    after = [weights for *_, weights in steps[1:]]
    after.append(dict(trainer.model.named_parameters()))
    for number, (inputs, loss, gradients, before) in enumerate(steps):
        part = rollouts.rows(parts[number])
        for name in ("advantages", "old_per_token_logps", "ref_per_token_logps", "evidence_share"):
            if name in inputs:
                given, theirs = part.inputs[name], inputs[name]
                if name.endswith("logps"):
                    theirs = theirs.masked_fill(~part.mask, 0.0)
                torch.testing.assert_close(given, theirs, rtol=1e-5, atol=2e-5)
        # Both from the trainer's weights: Adam makes steps of rounding where a gradient is small.
        engine.policy.load_weights(before)
        mine = engine.loss(part)
        torch.testing.assert_close(mine.detach(), loss, rtol=1e-5, atol=1e-6)
        mine.backward()
        torch.nn.utils.clip_grad_norm_(engine._parameters, config.max_grad_norm)
        found = engine.policy.weights(operator.attrgetter("grad"))
        assert found.keys() == gradients.keys()
        for name, theirs in gradients.items():
            error = (found[name] - theirs).norm() / theirs.norm().clamp(min=1e-9)
            assert error < 2e-5, (number, name, float(error))
        engine._advance()
        ended = engine.policy.weights()
        for name, theirs in after[number].items():
            moved = (theirs - before[name]).norm()
            assert (ended[name] - theirs).norm() < 2e-3 * moved, (number, name)


def test_logits_are_those_of_transformers(start) -> None:
    """Prompts of several lengths that run once, and responses of several lengths to each."""
    model, decoder = start.policy(), Decoder.of(start.policy())
    prompts, _ = _prompts(start, 3, (2, 3, 8))
    of = torch.tensor([0, 0, 1, 2, 2, 2])
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(20, 300, (6, 7), generator=generator)
    mask = torch.arange(7) < torch.tensor([7, 1, 3, 5, 7, 2])[:, None]
    tokens = prompts.tokens(decoder, torch.arange(3))
    later = prompts.start[of][:, None] + torch.arange(7)
    rows = tokens.columns(-1, None).rows(of).then(decoder.text(ids, mask, later))
    past = decoder.prefix(tokens.columns(None, -1)).rows(of)
    found = decoder.lm_head(decoder(**rows._asdict(), past=past).last_hidden_state)
    fields = prompts.fields
    pictures = (fields["pixel_values"], fields["image_grid_thw"])
    counts = [(of_row == start.reader.config.image_token_id).sum() // 4 for of_row in prompts.ids]
    values = pictures[0].split([16 * int(count) for count in counts])
    grids = pictures[1].split([int(count) for count in counts])
    wanted = model(
        input_ids=torch.cat([prompts.ids[of], ids], 1),
        attention_mask=torch.cat([prompts.mask[of], mask], 1).long(),
        mm_token_type_ids=torch.cat([fields["mm_token_type_ids"][of], torch.zeros_like(ids)], 1),
        pixel_values=torch.cat([values[n] for n in of]),
        image_grid_thw=torch.cat([grids[n] for n in of]),
    ).logits[:, -8:]
    seen = torch.cat([torch.ones(6, 1, dtype=torch.bool), mask], 1)
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-5, atol=1e-5)
    whole = decoder(**tokens.rows(of).then(decoder.text(ids, mask, later))._asdict())
    alone = decoder.lm_head(whole.last_hidden_state[:, -8:])
    torch.testing.assert_close(alone[seen], wanted[seen], rtol=1e-5, atol=1e-5)


def test_gradients_through_shared_keys(start) -> None:
    """They are those of a prompt that each rollout computes for itself."""
    decoder = Decoder.of(start.policy())
    prompts, _ = _prompts(start, 2, (2, 4))
    of = torch.tensor([0, 1, 0, 0, 1])
    tokens = prompts.tokens(decoder, torch.arange(2))
    weights = torch.randn(5, 1, 64, generator=torch.Generator().manual_seed(0))
    found = []
    for shared in (True, False):
        rows, past = tokens.rows(of), None
        if shared:
            past = decoder.prefix(tokens.columns(None, -1)).rows(of)
            rows = rows.columns(-1, None)
        hidden = decoder(**rows._asdict(), past=past).last_hidden_state[:, -1:]
        decoder.zero_grad()
        (hidden * weights).sum().backward()
        found.append(decoder.weights(lambda x: torch.zeros(()) if x.grad is None else x.grad))
    for name, mine in found[0].items():
        assert (mine - found[1][name]).norm() <= 1e-5 * found[1][name].norm().clamp(min=1e-6)


def test_samples_have_the_policys_frequencies(start, tmp_path) -> None:
    engine = _engine_of(start, tmp_path)
    logits = torch.randn(1, engine._allowed.numel(), generator=torch.Generator().manual_seed(0))
    count = 200_000
    drawn = engine._sample(logits.expand(count, -1).clone()).bincount(minlength=logits.numel())
    p = (logits[0] / engine.config.temperature + engine._allowed).softmax(-1)
    assert drawn[engine._allowed.isinf()].sum() == 0 and p.max() < 0.1
    deviations = (drawn / count - p) / (p * (1 - p) / count).sqrt().clamp(min=1e-9)
    assert deviations.abs().max() < 5
    assert deviations[~engine._allowed.isinf()].square().mean() == pytest.approx(1.0, abs=0.3)


def test_the_same_seed_is_the_same_run(start, tmp_path) -> None:
    """Bit for bit; another seed is another run."""
    ends = []
    for seed in (3, 3, 4):
        engine = _engine_of(start, tmp_path, seed=seed)
        engine.train()
        assert engine.steps == _STEPS and engine.batches == 1
        ends.append(engine.policy.weights())
    same = [[torch.equal(ends[0][n], other[n]) for n in other] for other in ends[1:]]
    assert all(same[0]) and not all(same[1])


def test_a_setting_without_a_form_is_refused(start, tmp_path) -> None:
    with pytest.raises(NotImplementedError, match="loss_type must be 'dapo'; got 'grpo'"):
        _engine_of(start, tmp_path, loss_type="grpo")


def _engine_of(start: _Start, folder: Any, **changed: Any) -> Engine:
    arm, rows = BY_NAME["ral"], TASKS["frames"].rows(4, (2, 3, 8), "train", 11, style="think")
    config = _config(arm, folder)
    for name, value in changed.items():
        setattr(config, name, value)
    return _engine(start, arm, config, rows)
