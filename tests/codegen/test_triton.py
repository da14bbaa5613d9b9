"""Every Triton kernel, compiled ahead of time for GPUs that are not here: it compiles, uses the
architecture's matrix instructions, does not spill, and fits.

Compiled are the launches that public calls would make, with the tile sizes of the tables: the calls
of `compiled_in_tests` in benchmarks/codegen/calls.py. `make codegen` compiles the whole table.
`make test-triton36` runs this file with an older Triton.
"""

from __future__ import annotations

import ast
import importlib.metadata
import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from benchmarks.codegen.calls import Call, calls, compiled_in_tests
from benchmarks.codegen.compiler import MATRIX_INSTRUCTIONS, SHARED_LIMIT
from benchmarks.codegen.table import Row, markdown, problems
from ral_kernels.runtime import triton_runtime
from ral_kernels.runtime.triton_runtime import ARCHITECTURES
from tests.asked import asked
from tests.conftest import skip_or_fail

pytestmark = pytest.mark.xdist_group("codegen")  # compile once

ROOT = Path(__file__).resolve().parents[2]
INSTRUCTION = dict(zip(ARCHITECTURES, MATRIX_INSTRUCTIONS, strict=True))
# (architecture, kernel) whose product is by mma.sync all the same, and why
OTHERWISE: Mapping[tuple[str, str], str] = {}
# (kernel, variant) whose wgmma ptxas serialises all the same: that of Triton 3.7.1 does
SERIALISED = {("attention_bwd_dq_kernel", "span bias")}


def compiled_for() -> tuple[str, ...]:
    """Architectures whose tiles are right for the installed Triton: 3.6 is for sm_90 alone."""
    is_old = triton_runtime._installed() and importlib.metadata.version("triton").startswith("3.6.")
    return ("sm_90",) if is_old else ARCHITECTURES


PAIRS = [(call.name, on) for call, on in compiled_in_tests() if on in compiled_for()]
NAMES = list(dict.fromkeys(name for name, _ in PAIRS))


def in_turn(name: str) -> str:
    """The architecture that a call is compiled for in the quick tier."""
    possible = [on for other, on in PAIRS if other == name]
    return possible[NAMES.index(name) % len(possible)]


# Left out: the same kernels in other dtypes and at other head dims.
QUICK = [(name, in_turn(name)) for name in NAMES if name.endswith((" bfloat16 128", " 0"))]
SLOW = pytest.mark.slow(stands_in="test_kernels")
Facts = Mapping[tuple[str, str], "list[Row]"]  # (call, architecture) -> its kernels


def codegen(file: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.codegen`, in a process without TRITON_INTERPRET."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--json", str(file), *options]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def rows_in(file: Path) -> list[Row]:
    return [Row.from_json(record) for record in json.loads(file.read_text())]


@pytest.fixture(scope="module")
def facts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Facts:
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    wanted = {(x["name"], x["architecture"]) for x in asked(request) if x} | set(QUICK)
    found: dict[tuple[str, str], list[Row]] = {}
    for architecture in compiled_for():
        names = [name for name in NAMES if (name, architecture) in wanted]
        file = tmp_path_factory.mktemp("codegen") / "facts.json"
        done = codegen(file, "--architectures", architecture, "--only", *names)
        assert file.exists(), done.stderr
        for row in rows_in(file):
            name = Call(row.op, row.variant, row.dtype, row.head_dim, lambda: None).name
            found.setdefault((name, row.facts.architecture), []).append(row)
    return found


@pytest.mark.parametrize(
    ("name", "architecture"),
    [pytest.param(*pair, marks=() if pair in QUICK else SLOW) for pair in PAIRS],
)
def test_kernels(name: str, architecture: str, facts: Facts) -> None:
    rows = facts[name, architecture]
    assert rows, "nothing was launched"
    assert not problems(rows), "\n".join(problems(rows))
    for row in rows:
        compiled = row.facts
        assert 0 < compiled.registers <= 255
        assert compiled.spills == 0
        assert compiled.shared <= SHARED_LIMIT[architecture]
        if row.head_dim > 128:
            continue  # registers do not always allow wgmma there: ral_kernels/ops/*/triton/tiles.py
        if (compiled.kernel, row.variant) not in SERIALISED:
            assert "C7515" not in compiled.remarks, f"{compiled.kernel}: ptxas serialises its wgmma"
        if compiled.multiplies:
            reason = OTHERWISE.get((architecture, compiled.kernel))
            wanted = INSTRUCTION[architecture] if reason is None else "mma.sync"
            assert wanted in compiled.instructions, f"{compiled.kernel}: {compiled.instructions}"


def test_every_kernel_is_in_the_table(facts: Facts) -> None:
    """Each *_kernel of the package is launched by a call that is compiled here, in every dtype."""
    written = set()
    files = [*ROOT.glob("ral_kernels/ops/*/triton/*.py"), *ROOT.glob("ral_kernels/runtime/*.py")]
    for file in files:
        written |= set(re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE))
    compiled = {row.facts.kernel for rows in facts.values() for row in rows}
    assert written - compiled == set(), "kernels that no call of the table launches"
    assert compiled - written == set(), "kernels whose name does not end in _kernel"


def test_main_kernels_multiply(facts: Facts) -> None:
    """What must run on matrix units does have a product for them to compute."""
    multiply = {row.facts.kernel for rows in facts.values() for row in rows if row.facts.multiplies}
    for kernel in (
        "attention_fwd_kernel",
        "attention_bwd_dq_kernel",
        "attention_bwd_dkdv_kernel",
        "policy_fwd_kernel",
        "policy_bwd_dq_kernel",
        "policy_bwd_dk_kernel",
    ):
        assert kernel in multiply


def test_table_of_calls() -> None:
    names = [call.name for call in calls()]
    assert len(names) == len(set(names))
    for dtype in ("float32", "bfloat16", "float16"):
        assert {on for call, on in compiled_in_tests() if call.dtype == dtype} == set(ARCHITECTURES)
    for op in ("attention", "policy", "policy_divergence"):
        for dtype in ("float32", "bfloat16", "float16"):
            found = {call.head_dim for call in calls() if (call.op, call.dtype) == (op, dtype)}
            assert {64, 128, 256} <= found


TOYS = """
import json, sys
import torch, triton
import triton.language as tl
from benchmarks.codegen.compiler import compile_launches
from benchmarks.codegen.table import Row
from ral_kernels.runtime import triton_runtime

@triton.jit
def toy_kernel(a_ptr, out_ptr, bias_ptr, stride, n, BLOCK: tl.constexpr, DOT: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    square = offs[:, None] * stride + offs[None, :]
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, n, BLOCK):
        a = tl.load(a_ptr + square + start)
        acc = tl.dot(a, a, acc) if DOT else acc + a
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs)[None, :]
    tl.store(out_ptr + square, acc)

def launch(block, num_warps, dot, stages=2):
    a, out = torch.zeros(512, 512, dtype=torch.float16), torch.zeros(512, 512)
    arguments = dict(a_ptr=a, out_ptr=out, bias_ptr=None, stride=512, n=512, BLOCK=block, DOT=dot)
    triton_runtime.launch(toy_kernel, (1,), arguments, num_warps, stages)

rows = []
for architecture in sys.argv[2:]:
    with triton_runtime.record_launches(architecture) as launches:
        launch(64, 4, True)
        launch(64, 4, True)  # the same again is not compiled again
        launch(64, 4, False)
        if architecture == "sm_90":
            launch(128, 1, True)  # 128 x 128 sums on 32 threads: 512 registers each
    facts = compile_launches(launches, architecture)
    rows += [Row("toy", str(i), "float16", 64, fact).as_json() for i, fact in enumerate(facts)]
json.dump(rows, open(sys.argv[1], "w"))
"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Row]:
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toys.py").write_text(TOYS)
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, sys.path)])
    command = [sys.executable, str(folder / "toys.py"), str(folder / "toys.json"), *ARCHITECTURES]
    subprocess.run(command, env=environment, check=True, cwd=ROOT)
    return rows_in(folder / "toys.json")


def test_the_facts_tell_good_from_bad(toys: list[Row]) -> None:
    """A kernel known to spill is seen to, and one without a product has no matrix instruction."""
    for architecture in ARCHITECTURES:
        good, plain, *others = [row for row in toys if row.facts.architecture == architecture]
        assert not problems([good]) and not problems([plain])
        assert INSTRUCTION[architecture] in good.facts.instructions
        assert good.facts.multiplies and not plain.facts.multiplies
        assert not set(plain.facts.instructions) & set(MATRIX_INSTRUCTIONS)
        assert good.facts.shared >= 2 * 64 * 64  # the tile of a, in float16
        assert len(others) == (architecture == "sm_90")
    (spilling,) = (row for row in toys if row.facts.spills)
    assert spilling.facts.spills > 1000
    (line,) = problems([spilling])
    assert "sm_90 toy_kernel" in line and "spills" in line


def test_markdown(toys: list[Row]) -> None:
    text = markdown(toys, {"triton": "3.x"})
    assert "no measurement on a GPU" in text and "triton 3.x" in text
    (line,) = (line for line in text.splitlines() if "| fp16 | 64 | 0 |" in line)
    assert "`toy_kernel`" in line and "mma" in line and "wgmma" in line and "tcgen05" in line
    assert text.count("B spilled") == 1
    assert Row.from_json(json.loads(json.dumps(toys[0].as_json()))) == toys[0]


@pytest.mark.slow(stands_in="test_kernels")
def test_the_interpreter_compiles_nothing(tmp_path: Path) -> None:
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "benchmarks.codegen", "--json", str(tmp_path / "f")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "TRITON_INTERPRET" in done.stderr
    done = codegen(tmp_path / "f", "--only", "nothing of that name")
    assert done.returncode == 2 and "unknown" in done.stderr


def test_no_kernel_takes_many_parameters() -> None:
    """Strides, sizes and options travel in named tuples."""
    counts: dict[str, int] = {}
    for file in ROOT.glob("ral_kernels/**/*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if not isinstance(node, ast.FunctionDef) or not node.name.endswith("_kernel"):
                continue
            if any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                counts[node.name] = len(node.args.args)
    assert counts and max(counts.values()) <= 18, max(counts.items(), key=lambda x: x[1])
