"""Settings of random examples: the same in every run, and however slow the machine."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

# To look for more, raise max_examples.
REPRODUCIBLE = settings(
    deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
