"""The term of a mixture's routers in a trainer: by hand, metrics, one line of YAML, resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import TrlParser

from ral import RALConfig
from ral.cli.main import main
from ral.cli.progress import read_metrics
from ral.router import RouterLoss
from tests.integrations import mixtures
from tests.integrations.eager_maps import assert_same_gradients, gradients

from . import by_hand, tiny
from .test_config import BASE
from .test_resuming import after, resumed, same_weights

slow = pytest.mark.slow(stands_in="test_the_term_by_hand")


def text_rows(rows: int = tiny.ROWS) -> Dataset:
    ask = "What is in picture {}?"
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": ask.format(i)}]} for i in range(rows)]
    )


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mixtures.checkpoint(tmp_path_factory.mktemp("qwen3_moe"))


def trainer(path: Path, tmp_path: Path, **config: Any) -> Any:
    settings = {"train_dataset": text_rows(), "router_coef": 2.0, "attn_coef": 0.0}
    return tiny.trainer(path, tmp_path, **{**settings, **config})


def routed_by_hand(model: Any, inputs: dict[str, Any], renormalised: bool) -> Tensor:
    """[layers, B, C, E] of the response's rows, from the logits that the model returns."""
    batch = by_hand.model_inputs(inputs)
    logits = model(**batch, output_router_logits=True, use_cache=False).router_logits
    shape, length = batch["input_ids"].shape, inputs["completion_ids"].shape[1]
    probabilities = torch.stack([x.view(*shape, -1).softmax(-1) for x in logits])
    if renormalised:
        last = probabilities.topk(mixtures.CHOSEN).values[..., -1:]
        kept = torch.where(probabilities >= last, probabilities, 0.0)
        probabilities = kept / kept.sum(-1, keepdim=True)
    return probabilities[:, :, -length - 1 : -1]


@pytest.mark.parametrize(
    "name, config, lora, renormalised",
    [
        ("all layers", {}, False, False),
        ("one layer", {"router_layers": "-1"}, False, False),
        ("renormalised", {"router_coef": 0.0}, False, True),
        pytest.param("kl", {"attn_divergence": "kl"}, False, False, marks=slow),
        pytest.param(
            "cross_entropy", {"attn_divergence": "cross_entropy"}, False, False, marks=slow
        ),
        pytest.param("lora", {}, True, False, marks=slow),
        ("checkpointed", {"gradient_checkpointing": True}, False, False),
        pytest.param(
            "mean of means", {"attn_reduction": "sequence_mean"}, False, False, marks=slow
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_term_by_hand(
    name: str, config: dict[str, Any], lora: bool, renormalised: bool, path: Path, tmp_path: Path
) -> None:
    """Value and gradient, from eager attention and the model's own logits, after a step."""
    more: dict[str, Any] = {"peft_config": tiny.lora()} if lora else {}
    if renormalised:
        more["terms"] = [RouterLoss(2.0, renormalised=True)]
    made = trainer(path, tmp_path, rl_coef=0.0, **config, **more)
    inputs = by_hand.batch_of(made)
    before = by_hand.stepped(made)
    loss = made._compute_loss(made.model, inputs)
    got = gradients(made.model, loss)

    layers = [1] if "router_layers" in config else [0, 1]  # of the model's two mixtures
    kind = config.get("attn_divergence", "jsd")
    with torch.no_grad(), by_hand.weights(made.model, before):
        references = routed_by_hand(made.model, inputs, renormalised)[layers]
    with by_hand.weights(made.model, None):
        routed = routed_by_hand(made.model, inputs, renormalised)[layers]
        values = by_hand.divergence(routed, references, kind).mean(0)
        reduction = config.get("attn_reduction", "token_mean")
        weighted = inputs["advantages"][:, None] * values
        mean = by_hand.response_mean(weighted, inputs, reduction)
        if reduction == "token_mean":
            mean = mean * inputs["completion_mask"].sum() / (inputs["num_items_in_batch"] / 2)
        wanted = gradients(made.model, 2.0 * mean)
    assert abs(mean.item()) > 1e-6
    torch.testing.assert_close(loss.detach(), 2.0 * mean.detach(), rtol=1e-5, atol=1e-8)
    assert_same_gradients(got, wanted, 1e-5)

    logged = made._metrics["train"]
    assert logged["router/loss"] == pytest.approx([mean.item()], rel=1e-5, abs=1e-8)
    if kind == "cross_entropy":  # the metric leaves out the reference's entropy
        values = by_hand.divergence(routed, references, "reverse_kl").mean(0)
    divergence = by_hand.response_mean(values, inputs).item()
    assert logged["router/divergence"] == pytest.approx([divergence], rel=1e-4)


def test_load_and_dead_experts(path: Path, tmp_path: Path) -> None:
    made = trainer(path, tmp_path)
    inputs = by_hand.batch_of(made)
    gate = made.model.model.layers[0].mlp.gate
    with torch.no_grad():  # equal logits: the first two of six experts are always chosen
        gate.weight.zero_()
    made._compute_loss(made.model, inputs)
    model_inputs, mask = by_hand.model_inputs(inputs), inputs["completion_mask"].bool()
    with torch.no_grad():
        logits = made.model(**model_inputs, output_router_logits=True).router_logits
    loads, dead = [], []
    for each in logits:
        p = each.view(*model_inputs["input_ids"].shape, -1)[:, -mask.shape[1] - 1 : -1][mask]
        chosen = p.topk(mixtures.CHOSEN).indices.flatten()
        counts = chosen.bincount(minlength=mixtures.EXPERTS).float()
        loads.append((counts.max() / counts.mean()).item())
        dead.append((counts == 0).sum().item())
    assert loads[0] == 3.0 and dead[0] == 4  # 6 experts over 2
    assert made._metrics["train"]["router/load"] == pytest.approx([sum(loads) / 2])
    assert made._metrics["train"]["router/dead"] == pytest.approx([sum(dead) / 2])


def test_nothing_at_the_reference(path: Path, tmp_path: Path) -> None:
    """In the first step on a rollout batch the term is zero up to the rounding of other shapes."""
    made = trainer(path, tmp_path, rl_coef=0.0, per_device_train_batch_size=8)
    inputs = by_hand.batch_of(made)
    loss = made._compute_loss(made.model, inputs)
    assert loss.item() == 0.0
    assert all((x == 0).all() for x in gradients(made.model, loss).values())


def test_the_balance_loss_stays(path: Path, tmp_path: Path) -> None:
    """The gradient is the sum of both: TRL adds the model's own balance loss as before."""
    found = {}
    for coef, balance in ((0.0, 0.05), (2.0, 0.0), (2.0, 0.05)):
        torch.manual_seed(0)
        made = trainer(
            path, tmp_path, router_coef=coef, router_aux_loss_coef=balance, beta=0.0,
            attn_reduction="token_mean",
        )  # fmt: skip
        inputs = by_hand.batch_of(made)
        inputs["advantages"] = torch.tensor([1.0, -1.0, 0.5, -0.5])
        by_hand.stepped(made)
        found[coef, balance] = gradients(made.model, made._compute_loss(made.model, inputs))
        assert ("aux_loss" in made._metrics["train"]) == (balance > 0)
        if not coef:
            made.args.rl_coef, made.router_aux_loss_coef = 1.0, 0.0
            made.aux_loss_enabled = False
            grpo = gradients(made.model, made._compute_loss(made.model, inputs))
    both = found[2.0, 0.05]
    summed = {name: found[0.0, 0.05][name] + found[2.0, 0.0][name] - grpo[name] for name in both}
    assert_same_gradients(both, summed, 1e-5)
    gate = "model.layers.0.mlp.gate.weight"
    assert (both[gate] - found[2.0, 0.0][gate]).norm() > 1e-6


@slow
def test_training_and_resuming(path: Path, tmp_path: Path) -> None:
    """A resumed run has every later loss and metric of the run that did not stop."""
    config = {"router_coef": 2.0, "attn_coef": 0.0, "train_dataset": text_rows(), "max_steps": 7}
    straight, other = resumed(path, tmp_path, 4, **config)
    assert after(other, 4) == after(straight, 4) and len(after(other, 4)) > 1
    assert same_weights(straight, other)
    losses = tiny.logged(straight, "router/loss")
    divergences = tiny.logged(straight, "router/divergence")
    assert len(losses) == 7 and abs(losses[0]) < 1e-9 < abs(losses[1])
    assert divergences[0] < 1e-9 < divergences[3]  # the fourth step on the rollout batch
    assert all(1.0 <= load <= 3.0 for load in tiny.logged(straight, "router/load"))


def test_one_line_of_yaml(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"output_dir: {tmp_path}\nuse_cpu: true\nbf16: false\nnum_iterations: 2\nrouter_coef: 0.1\n"
    )
    (config,) = TrlParser([RALConfig]).parse_args_and_config(
        ["--config", str(tmp_path / "run.yaml")]
    )
    assert (config.router_coef, config.router_layers) == (0.1, "all")
    for given, wanted in (("-1", -1), ("0,2", [0, 2]), ([0, 2], [0, 2]), (None, "all")):
        assert RALConfig(**BASE, router_layers=given).router_layers == wanted


def test_from_the_command_line(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows of text, router_coef as a word: at the second step on the rollouts the term acts."""
    row = {
        "problem": "What is it?", "options": ["A. a cat", "B. a dog"], "data_type": "text",
        "solution": "<answer>A</answer>", "problem_type": "multiple choice",
    }  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(4)))
    (tmp_path / "rewards.py").write_text(
        "def lengths(completions, **columns):\n"
        "    return [len(c[0]['content']) % 5.0 for c in completions]\n"
    )
    words = [
        "train", f"model={path}", f"data={tmp_path / 'rows.jsonl'}", f"output_dir={tmp_path / 'a'}",
        f"rewards={tmp_path / 'rewards.py'}:lengths", "use_cpu=true", "report_to=none",
        "per_device_train_batch_size=4", "num_generations=4", "max_completion_length=6",
        "temperature=1", "num_iterations=2", "max_steps=2", "learning_rate=1e-2", "attn_coef=0",
        "router_coef=2", "gradient_checkpointing=false", "save_strategy=no",
    ]  # fmt: skip
    assert main(words) != 0
    assert "gives them, or freeze_vision=false; got Qwen3MoeForCausalLM" in capsys.readouterr().err
    assert main([*words, "freeze_vision=false"]) == 0
    steps = [step for step in read_metrics(tmp_path / "a/metrics.jsonl") if "loss" in step]
    assert abs(steps[0]["router/divergence"]) < 1e-9 < steps[1]["router/divergence"]
    assert steps[1]["router/loss"] != 0 and "router/load/inner_1" in steps[1]


def test_what_is_refused(path: Path, tmp_path: Path) -> None:
    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match="^RALConfig: " + match):
            RALConfig(**{**BASE, "attn_coef": 0.0, "router_coef": 0.1, **settings})

    refused("router_coef must be finite and >= 0; got -1", router_coef=-1.0)
    refused("router_layers must be a number, a list of .*; got 'last'", router_layers="last")
    refused("router_coef > 0 needs more than one optimizer step .*than it$", num_iterations=1)
    refused("router_coef > 0 needs max_completion_length > 1", max_completion_length=1)
    with pytest.raises(NotImplementedError, match=r"^capture_router: model must have blocks of"):
        tiny.trainer(tiny.checkpoint(tmp_path), tmp_path, router_coef=0.1)
