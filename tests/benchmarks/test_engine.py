"""The study's engine against what it stands for: transformers' model and `ral.RALTrainer`."""

from __future__ import annotations

import zlib
from typing import Any

import pytest
import torch

from benchmarks.study import run as one
from benchmarks.study.arms import ARMS, Arm
from benchmarks.study.decoder import Decoder
from benchmarks.study.engine import Engine, Rollouts, suppressed_tokens
from benchmarks.study.prompts import Reader
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
    trainer = RALTrainer(
        start.policy(), _reward, config, train_dataset=rows,
        processing_class=start.reader.processor, teacher_model=teacher,
    )  # fmt: skip
    if trainer.ref_model is not None:
        trainer.ref_model.model.visual = start.reader.pictures
    steps: list[Any] = []
    compute = trainer._compute_loss

    def loss(model: Any, inputs: Any) -> Any:
        value = compute(model, inputs)
        steps.append([dict(inputs), value.detach().clone(), {}])
        return value

    class Keep(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, model: Any, **kwargs: Any) -> None:
            steps[-1][2] = {n: p.grad.clone() for n, p in model.named_parameters()}

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


def _engine(start: _Start, arm: Arm, config: RALConfig, rows: Any) -> Engine:
    from trl.data_utils import prepare_multimodal_messages

    rows = [rows[number] for number in range(len(rows))]
    messages = [prepare_multimodal_messages(row["prompt"], images=row["images"]) for row in rows]
    return Engine(
        Decoder.of(start.policy()), config,
        start.reader.encode(messages, add_generation_prompt=True), rows, start.reader.tokenizer,
        _reward, suppressed=suppressed_tokens(start.reader.config, start.reader.processor),
        teacher=Decoder.of(start.policy(0.02)).requires_grad_(False) if arm.teacher else None,
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


_COMPARED = [arm for arm in ARMS if "frames" in arm.tasks and arm.control in (None, "flipped")]


@pytest.mark.parametrize("arm", _COMPARED, ids=lambda arm: arm.name)
def test_steps_are_those_of_the_trainer(arm, start, tmp_path) -> None:
    """Loss and every gradient in four optimizer steps, and the weights after them."""
    rows = TASKS["frames"].rows(4, (2, 3, 8), "train", 11, style="think")
    config = _config(arm, tmp_path)
    trainer, steps = _of_trainer(start, arm, config, rows)
    engine = _engine(start, arm, config, rows)
    suppressed = engine._allowed.isinf().nonzero()[:, 0].tolist()
    assert suppressed == trainer.generation_config.suppress_tokens
    rollouts, parts = _rollouts(engine, steps)
    lengths = rollouts.mask.sum(-1)
    assert lengths.min() < lengths.max() and not engine.prompts.mask.all()
    rollouts = engine.score(rollouts)
    for number, (inputs, loss, gradients) in enumerate(steps):
        part = rollouts.rows(parts[number])
        for name in ("advantages", "old_per_token_logps", "ref_per_token_logps", "evidence_share"):
            if name in inputs:
                mine, theirs = part.inputs[name].float(), inputs[name].float()
                if name.endswith("logps"):
                    theirs = theirs.masked_fill(~part.mask, 0.0)
                torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=2e-5)
        mine = engine.loss(part)
        torch.testing.assert_close(mine.detach(), loss, rtol=1e-5, atol=2e-6)
        mine.backward()
        torch.nn.utils.clip_grad_norm_(engine._parameters, config.max_grad_norm)
        found = engine.policy.weights(lambda weight: weight.grad)
        assert found.keys() == gradients.keys()
        for name, theirs in gradients.items():
            error = (found[name] - theirs).norm() / theirs.norm().clamp(min=1e-9)
            assert error < 1e-4, (number, name, float(error))
        engine._advance()
    after = engine.policy.weights()
    for name, theirs in trainer.model.named_parameters():
        torch.testing.assert_close(after[name], theirs, rtol=0, atol=1e-4)
