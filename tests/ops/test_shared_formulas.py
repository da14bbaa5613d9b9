"""Constants that C++, Triton and Python write down each for itself are the same.

They are read from the sources, wherever in csrc they stand, so that nothing has to be built.
"""

from __future__ import annotations

import math
import re
import struct
from pathlib import Path

from ral_kernels.ops.policy.reference import NORMALISED_WITHIN, SMALLEST_WEIGHT

ROOT = Path(__file__).resolve().parents[2]
TERMS = ROOT / "ral_kernels" / "ops" / "divergence" / "triton" / "terms.py"
SOFTMAX = ROOT / "ral_kernels" / "runtime" / "triton_softmax.py"
SIDE = ROOT / "ral_kernels" / "ops" / "policy" / "triton" / "side.py"
TARGET = SIDE.with_name("target.py")
HEADERS = sorted((ROOT / "csrc").rglob("*.h"))

FLOAT = r"\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+"


def code(file: Path) -> str:
    """A source without its comments."""
    comment = r"#.*|\"\"\"(?:.|\n)*?\"\"\"" if file.suffix == ".py" else r"//.*"
    return re.sub(comment, "", file.read_text())


def headers(*names: str) -> str:
    found = [code(file) for file in HEADERS if file.name in names]
    assert found, f"no {' or '.join(names)} in csrc"
    return "\n".join(found)


def numbers(text: str) -> set[float]:
    """Literals, as float32; 0, 1, 2 and 0.5 say nothing."""
    return {float32(x) for x in re.findall(FLOAT, text)} - {0.0, 1.0, 2.0, 0.5}


def float32(x: str | float) -> float:
    return float(struct.unpack("f", struct.pack("f", float(x)))[0])


def reciprocals(text: str) -> set[int]:
    """Every n of 1 / n."""
    return {int(n) for n in re.findall(r"\b1\.0?f? / (\d+)\.0?f?", text)}


def test_series_of_the_divergences() -> None:
    c, triton = headers("divergence_terms.h", "divergence_math.h"), code(TERMS)
    jsd = {(2 * n + 1) * (2 * n + 2) for n in range(1, 6)}  # (6)
    assert reciprocals(triton) == reciprocals(c) == jsd | set(range(3, 14, 2))


def test_bounds_of_the_divergences() -> None:
    c = numbers(headers("divergence_terms.h", "divergence_math.h"))
    log_2_24 = float32(24 * math.log(2))  # C++ multiplies
    assert numbers(code(TERMS)) - {log_2_24} <= c


def test_smallest_weights() -> None:
    text = "\n".join(code(file) for file in HEADERS)
    found = re.findall(rf"\bkSmallestWeight = ({FLOAT})f", text)
    assert found and {float32(x) for x in found} == {SMALLEST_WEIGHT}
    triton = dict(
        re.findall(r"^(SMALLEST_\w+) = tl\.constexpr\(2\.0\*\*(-\d+)\)", code(SIDE), re.M)
    )
    assert 2.0 ** int(triton["SMALLEST_WEIGHT"]) == SMALLEST_WEIGHT
    # The backward counts no weight that the forward takes for 0.
    assert int(triton["SMALLEST_HEAD_WEIGHT"]) < int(triton["SMALLEST_HEAD_WEIGHT_BWD"])


def test_targets_that_are_normalised_already() -> None:
    (c,) = re.findall(rf"\bkNormalisedWithin = ({FLOAT})f", headers("divergence_math.h"))
    (triton,) = re.findall(
        r"^NORMALISED_WITHIN = tl\.constexpr\(2\.0\*\*(-\d+)\)", code(TARGET), re.M
    )
    assert float32(c) == 2.0 ** int(triton) == NORMALISED_WITHIN


def test_tanh() -> None:
    """Its polynomial, and the bound up to which it serves."""
    triton = code(SOFTMAX)
    body = numbers(triton[triton.index("def tanh") :])
    c = numbers(headers("simd.h", "attention_math.h", "softmax.h"))
    assert len(body) == 6 and body <= c


def test_conversions_to_base_2() -> None:
    c = headers("attention_math.h")
    triton = code(SOFTMAX) + code(TERMS.parents[2] / "attention" / "triton" / "scores.py")
    for ours, theirs, value in (
        ("LOG2E", "kLog2e", 1 / math.log(2)),
        ("LN2", "kLn2", math.log(2)),
    ):
        (a,) = re.findall(rf"^{ours} = tl\.constexpr\(({FLOAT})\)", triton, re.M)
        (b,) = re.findall(rf"\b{theirs} = ({FLOAT})f", c)
        assert float32(a) == float32(b) == float32(value)
