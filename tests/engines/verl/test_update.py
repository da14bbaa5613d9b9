"""ral.engines.verl: verl's own update of an actor, against eager attention by hand.

`make test-verl` runs it, in an environment of its own: verl and TRL 1.16 exclude each other.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engines.verl import rollouts
from tests.engines.verl.rollouts import CASES, WORKER
from tests.integrations.eager_maps import eager_policy
from tests.integrations.models import build

if importlib.util.find_spec("verl") is None:
    pytest.skip("verl is in an environment of its own: make test-verl", allow_module_level=True)

ROOT = Path(__file__).parents[3]
RUNS = [(name, 1) for name, case in CASES.items() if case.ulysses == 1]
RUNS += [(name, 2) for name, case in CASES.items() if case.ulysses == 2]
RUNS += [(name, 2) for name in ("checkpointed", "sequence mean", "pictures")]

BY_HAND = [(name, size) for name, size in RUNS if name not in ("lora", "bfloat16")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], Any]:
    """What the cases wrote, in one process and in two."""
    folder = tmp_path_factory.mktemp("verl")
    for family in {case.family for case in CASES.values()}:
        build(family).save_pretrained(folder / family)
    environment = {
        **os.environ,
        **rollouts.ENVIRONMENT,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    for world_size in (1, 2):
        names = [name for name, size in RUNS if size == world_size]
        names += [WORKER] if world_size == 1 else []
        processes = []
        logs = [folder / f"{world_size}-{rank}.log" for rank in range(world_size)]
        for rank, log in enumerate(logs):
            job = ["tests.engines.verl.processes", str(folder), str(world_size), str(rank), *names]
            with log.open("w") as out:
                processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *job],
                        env=environment,
                        cwd=ROOT,
                        stdout=out,
                        stderr=subprocess.STDOUT,
                    )
                )
        try:
            codes = [process.wait(timeout=900) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert codes == [0] * world_size, "\n".join(log.read_text()[-4000:] for log in logs)
    return {
        (name, size): torch.load(folder / f"{name}-{size}.pt", weights_only=False)
        for name, size in [*RUNS, (WORKER, 1)]
    }


def _policies(model: Any, row: rollouts.Row, layers: list[int]) -> tuple[list[torch.Tensor], Any]:
    """The policies of the queries that predict the response, and log p of its tokens."""
    positions = row.position_ids[..., None, :]
    pictures = {k: x.double() if x.is_floating_point() else x for k, x in row.pictures.items()}
    batch = {"input_ids": row.ids[None], "position_ids": positions, **pictures}
    out = model(**batch, output_attentions=True, use_cache=False)
    queries = slice(len(row.ids) - row.response - 1, -1)
    log_p = out.logits[0, queries].log_softmax(-1)
    log_p = log_p.gather(-1, row.ids[-row.response :, None])[:, 0]
    return [eager_policy(out.attentions[i])[0, queries] for i in layers], log_p


def _divergence(p: torch.Tensor, r: torch.Tensor, kind: str) -> torch.Tensor:
    """Of each row, in nats."""

    def relative_entropy(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        used = a > 0
        ratio = torch.where(used, a, 1.0) / torch.where(used, b, 1.0)
        return torch.where(used, a * ratio.log(), 0.0).sum(-1)

    if kind == "kl":
        return relative_entropy(p, r)
    middle = (p + r) / 2
    return (relative_entropy(p, middle) + relative_entropy(r, middle)) / 2


def _by_hand(name: str, weights: dict[str, Any], old: dict[str, Any]) -> dict[str, float]:
    """Loss, term, mean divergence and norms of the gradient, in float64, one row at a time."""
    case = CASES[name]
    settings = dict(case.ral)
    layers = [0, 1] if settings.get("layers") == "all" else [1]
    rows = rollouts.rows(case.family)
    tokens = sum(int(row.mask.sum()) for row in rows)
    model = build(case.family, "eager").double()
    model.load_state_dict(old, strict=False)
    with torch.no_grad():
        references = [_policies(model, row, layers)[0] for row in rows]
    model.load_state_dict(weights, strict=False)
    token_loss, term, divergence = (torch.zeros((), dtype=torch.float64) for _ in range(3))
    for row, reference in zip(rows, references, strict=True):
        policies, log_p = _policies(model, row, layers)
        token_loss = token_loss - (row.advantage * log_p * row.mask).sum() / tokens
        for p, r in zip(policies, reference, strict=True):
            value = (_divergence(p, r, settings.get("divergence", "jsd")) * row.mask).sum()
            divergence = divergence + value.detach() / tokens / len(layers)
            by = tokens
            if settings.get("reduction") == "sequence_mean":
                by = int(row.mask.sum()) * len(rows)
            term = term + row.advantage * value / by / len(layers)
    total = token_loss + rollouts.COEFFICIENT * term

    def norm(loss: torch.Tensor) -> float:
        parameters = [x for x in model.parameters() if x.requires_grad]
        found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        return float(torch.cat([x.flatten() for x in found if x is not None]).norm())

    return {
        "loss": total.item(), "attn/loss": term.item(), "attn/divergence": divergence.item(),
        "grad_norm": norm(total), "grad_norm without the term": norm(token_loss),
    }  # fmt: skip


@pytest.mark.parametrize(("name", "world_size"), BY_HAND)
def test_the_term_is_that_of_eager_attention(
    runs: dict[tuple[str, int], Any], name: str, world_size: int
) -> None:
    """Value, mean divergence and gradient, from the second update on."""
    updates = runs[name, world_size]["updates"]
    for update in updates[1:]:
        wanted = _by_hand(name, update["weights"], updates[0]["weights"])
        got = {
            metric: sum(of_rank[metric] for of_rank in update["metrics"]) / world_size
            for metric in update["metrics"][0]
        }
        got["grad_norm"] = update["grad_norm"]
        assert got["attn/loss"] == pytest.approx(wanted["attn/loss"], rel=1e-3)
        assert got["attn/divergence"] == pytest.approx(wanted["attn/divergence"], rel=1e-3)
        assert got["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-4)
        # or the gradient would say nothing of the term
        without = wanted["grad_norm without the term"]
        assert abs(wanted["grad_norm"] - without) > 1e-2 * without


@pytest.mark.parametrize(("name", "world_size"), RUNS)
def test_the_first_update_on_a_batch_has_a_term_of_exactly_zero(
    runs: dict[tuple[str, int], Any], name: str, world_size: int
) -> None:
    first, second, _ = runs[name, world_size]["updates"]
    rows_run_alike = not CASES[name].shuffled
    for metrics in first["metrics"]:
        for x in metrics.values():
            assert x == 0.0 if rows_run_alike else abs(x) < 1e-10
    assert all(x != 0.0 for x in second["metrics"][0].values())


def test_the_weights_on_their_way_to_the_rollouts_end_the_batch(
    runs: dict[tuple[str, int], Any],
) -> None:
    assert all(runs[run]["kept"] == 0 for run in RUNS)


def test_the_worker_of_verl_logs_the_term_of_each_mini_batch_of_each_epoch(
    runs: dict[tuple[str, int], Any],
) -> None:
    metrics = runs[WORKER, 1]["metrics"]
    for name in ("attn/loss", "attn/divergence"):
        first, *others = metrics[name]
        assert abs(first) < 1e-10 and len(others) == 3
        assert all(abs(x) > 1e-6 for x in others)
    assert len(metrics["actor/pg_loss"]) == 4


def test_an_update_on_rows_without_old_log_probabilities_is_refused(
    runs: dict[tuple[str, int], Any],
) -> None:
    assert "bypass_mode must be false" in runs[WORKER, 1]["refused"]
