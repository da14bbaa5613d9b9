"""The target objective: rows pulled towards one distribution over the keys that they share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...harness.objective import Objective
from ..ral.problem import DEFAULT_ROWS
from .contestants import CONTESTANTS
from .exact import exact_answers
from .problem import TargetProblem, make_problem


def _facts(problem: TargetProblem) -> dict[str, Any]:
    return {"rows": problem.num_rows, "marked": problem.ids.shape[2]}


def _summary(size: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        f"{size['rows']} response rows, {size['marked']} marked keys",
        "float64 gate on the loss and all gradients",
    )


TARGET = Objective(
    name="target",
    title="Cross-entropy with a target that rows share",
    outputs=("loss",),
    gradients=("dq", "dk"),
    contestants=CONTESTANTS,
    peers=("chunked_16", "chunked_64"),
    cuda_peers=("chunked_256",),
    peer_heading="/ chunked",
    peer_claim="the fastest chunked PyTorch",
    # a product for the scores; in the backward it once more, for dq and for dk
    flops_per_pair={"forward": 2, "forward+backward": 8},
    problem=TargetProblem,
    make=make_problem,
    exact=exact_answers,
    facts=_facts,
    summary=_summary,
    default_rows=DEFAULT_ROWS,
    slack_for_ours=False,
)
