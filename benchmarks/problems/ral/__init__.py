"""The ral objective: the token-level RAL loss, some response rows against all keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...harness.objective import Objective
from .contestants import CONTESTANTS
from .exact import exact_answers
from .problem import DEFAULT_ROWS, RalProblem, make_problem


def _facts(problem: RalProblem) -> dict[str, Any]:
    return {"rows": problem.num_rows}


def _summary(size: Mapping[str, Any]) -> tuple[str, ...]:
    return (f"{size['rows']} response rows", "float64 gate on the loss and all gradients")


RAL = Objective(
    name="ral",
    title="Token-level RAL loss",
    outputs=("loss",),
    gradients=("dq", "dk"),
    contestants=CONTESTANTS,
    peers=("chunked_16", "chunked_64"),
    cuda_peers=("chunked_256",),
    peer_heading="/ chunked",
    peer_claim="the fastest chunked PyTorch",
    # a product for the scores of either policy; in the backward these once more, for dq and for dk
    flops_per_pair={"forward": 4, "forward+backward": 12},
    problem=RalProblem,
    make=make_problem,
    exact=exact_answers,
    facts=_facts,
    summary=_summary,
    default_rows=DEFAULT_ROWS,
    slack_for_ours=False,
)
