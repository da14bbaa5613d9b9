"""The attention objective: attention with span marginals, every row of the layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...harness.objective import Objective
from .contestants import CONTESTANTS, LAYOUT_PAIRS
from .exact import exact_answers
from .problem import AttentionProblem, make_problem


def _facts(problem: AttentionProblem) -> dict[str, Any]:
    return {
        "num_spans": problem.num_spans,
        "contiguous_spans": problem.spans.is_contiguous,
        "gate_rows": problem.gate_rows.numel(),
    }


def _summary(size: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{size['num_spans']} spans",
        f"float64 gate on {size['gate_rows']} of {size['seqlen']} queries",
    )


ATTENTION = Objective(
    name="attention",
    title="Attention marginals",
    outputs=("out", "marginals"),
    gradients=("dq", "dk", "dv"),
    contestants=CONTESTANTS,
    peers=("sdpa",),  # the floor
    cuda_peers=("sdpa_cudnn", "sdpa_flash", "sdpa_efficient"),
    peer_heading="/ SDPA",
    peer_claim="plain SDPA",
    # the backward has 5 products to the forward's 2
    flops_per_pair={"forward": 4, "forward+backward": 14},
    problem=AttentionProblem,
    make=make_problem,
    exact=exact_answers,
    facts=_facts,
    summary=_summary,
    layout_pairs=LAYOUT_PAIRS,
)
