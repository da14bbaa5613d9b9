"""The same random calls in every run; `make fuzz` looks for more."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.conftest import skip_or_fail, supported_isas
from tests.fuzz.calls import Plan, check, plans
from tests.hypothesis_settings import REPRODUCIBLE

FEW = settings(
    REPRODUCIBLE,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
EITHER = pytest.mark.parametrize("malformed", [False, True], ids=["valid", "malformed"])


@EITHER
def test_random_calls(malformed: bool) -> None:
    if not supported_isas():
        skip_or_fail("cpu", "ral_cpu is not built")

    @FEW
    @given(plans(malformed))
    def run(plan: Plan) -> None:
        check(plan)

    run()
