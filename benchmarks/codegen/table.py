"""The facts of all kernels as a table: benchmarks/results/codegen.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ral_kernels.runtime.triton_runtime import ARCHITECTURES

from .calls import COUNTED
from .compiler import COPY_INSTRUCTIONS, MATRIX_INSTRUCTIONS, SHARED_LIMIT, Facts
from .loops import Loop, Turn

DTYPE_NAMES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
# What ptxas says of wgmma, by the code of its message.
REMARKS = {
    "C7515": "it serialises them",
    "C7517": "it adds a wait",
    "C7519": "it adds an arrive",
}
SIZES = ("BLOCK_Q", "BLOCK_R", "BLOCK_K", "BLOCK_N")  # rows, keys; others follow by name


LOOPS_ARE = (
    "What one warp issues in one turn of a loop with a matrix product, counted in the machine "
    "code: a turn is a block of keys, and in the kernels of dk and dv a block of queries. Where a "
    "loop branches, `least – most` are its shortest and its longest path, with one turn of the "
    "loops within it. Of two loops the first has no masks and the second is for edges; 1.1 is a "
    "loop within 1. With short spans the second of three is of neighbours in several spans; in dk "
    "and dv with spans the first is of mixed blocks. Barriers are those of the CTA. `8 LDGSTS 16`: "
    "eight asynchronous copies of 16 bytes a thread from global memory. On sm_100 one warp issues "
    "the products. "
    f"Programs: of a call of batch size 1 with {COUNTED[0].heads}:{COUNTED[0].kv_heads} heads and "
    "so many keys, on 132 multiprocessors; a policy has 256 rows."
)


@dataclass(frozen=True)
class Row:
    """One kernel of one call on one architecture."""

    op: str
    variant: str
    dtype: str
    head_dim: int
    facts: Facts
    programs: tuple[str, ...] = ()  # at each size of COUNTED, where loops are asked for

    def as_json(self) -> dict[str, Any]:
        record = asdict(self)
        facts = record.pop("facts")
        return {**record, **facts}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Row:
        record = dict(record)
        programs = tuple(record.pop("programs"))
        own = {name: record.pop(name) for name in ("op", "variant", "dtype", "head_dim")}
        for name in ("instructions", "remarks"):
            record[name] = tuple(record[name])
        record["loops"] = tuple(map(Loop.from_json, record["loops"]))
        return cls(**own, facts=Facts(**record), programs=programs)


def problems(rows: Iterable[Row]) -> list[str]:
    """What must not be: a spill, too much shared memory, a product without matrix instructions."""
    found = []
    for row in rows:
        facts = row.facts
        where = f"{facts.architecture} {facts.kernel} ({row.variant}, {row.dtype}, {row.head_dim})"
        if facts.error:
            found.append(f"{where}: {facts.error}")
        if facts.spills:
            found.append(f"{where}: spills {facts.spills} bytes a thread")
        if facts.shared > SHARED_LIMIT[facts.architecture]:
            limit = SHARED_LIMIT[facts.architecture]
            found.append(f"{where}: {facts.shared} bytes of shared memory of {limit}")
        if facts.multiplies and not set(facts.instructions) & set(MATRIX_INSTRUCTIONS):
            found.append(f"{where}: multiplies without a matrix instruction")
    return found


def _tile(facts: Facts) -> str:
    sizes = sorted(
        (name for name in facts.constants if name.startswith("BLOCK")),
        key=lambda name: (SIZES.index(name) if name in SIZES else len(SIZES), name),
    )
    return " x ".join(str(facts.constants[name]) for name in sizes)


def _cell(facts: Facts | None) -> str:
    if facts is None:
        return ""
    if facts.error:
        return "**does not compile**"
    names = [name for name in MATRIX_INSTRUCTIONS if name in facts.instructions]
    copies = ["TMA"] if COPY_INSTRUCTIONS[0] in facts.instructions else []
    spilled = [f"**{facts.spills} B spilled**"] if facts.spills else []
    parts = [
        _tile(facts),
        f"{facts.num_warps} w",
        f"{facts.num_stages} s",
        f"{facts.registers} r",
        f"{facts.shared / 1024:.0f} KiB",
        *(name.split(".")[0] for name in names),
        *copies,
        *facts.remarks,
        *spilled,
    ]
    return " · ".join(part for part in parts if part)


def _lines(rows: Sequence[Row], architectures: Sequence[str]) -> list[str]:
    """Table lines of one op; variants with the same kernels on all architectures share a line."""
    cells: dict[tuple[str, str, int, str], dict[str, list[str]]] = {}
    for row in rows:
        key = (row.facts.kernel, row.dtype, row.head_dim, row.variant)
        places = cells.setdefault(key, {name: [] for name in architectures})
        cell = _cell(row.facts)
        if cell not in places[row.facts.architecture]:
            places[row.facts.architecture].append(cell)
    merged: dict[tuple[str, str, int, str], list[str]] = {}
    for (kernel, dtype, head_dim, variant), places in cells.items():
        text = " | ".join("<br>".join(places[name]) for name in architectures)
        merged.setdefault((kernel, dtype, head_dim, text), []).append(variant)
    lines, before = [], ""
    for (kernel, dtype, head_dim, text), variants in sorted(
        merged.items(),
        key=lambda item: (item[0][0], list(DTYPE_NAMES).index(item[0][1]), item[0][2]),
    ):
        shown = f"`{kernel}`" if kernel != before else ""
        before = kernel
        dim = head_dim or ""
        lines.append(f"| {shown} | {DTYPE_NAMES[dtype]} | {dim} | {', '.join(variants)} | {text} |")
    return lines


LOOPS = (
    "kernel", "variants", "dtype", "head dim", "architecture", "tile", "warps", "stages",
    "registers", "spilled", *(f"programs, {x.seqlen // 1024}k" for x in COUNTED), "loop",
    "instructions", "barriers", "products", "loads, bytes", "stores",
)  # fmt: skip


def loop_table(rows: Sequence[Row]) -> list[str]:
    """A line for each main loop. Variants with the same loops share their lines."""
    merged: dict[tuple[tuple[str, ...], ...], list[Row]] = {}
    for row in rows:
        merged.setdefault(tuple(_loop_lines(row)), []).append(row)
    lines = [f"| {' | '.join(LOOPS)} |", "|---" * len(LOOPS) + "|"]
    for cells, alike in sorted(merged.items(), key=lambda item: _loop_order(item[1][0])):
        variants = ", ".join(dict.fromkeys(row.variant for row in alike))
        for kernel, *others in cells:
            lines.append(f"| {kernel} | {' | '.join([variants if kernel else '', *others])} |")
    return lines


def _loop_order(row: Row) -> tuple[str, str, int, int]:
    facts = row.facts
    dtype, architecture = list(DTYPE_NAMES).index(row.dtype), facts.architecture
    return facts.kernel, str(dtype), row.head_dim, ARCHITECTURES.index(architecture)


def _loop_lines(row: Row) -> Iterator[tuple[str, ...]]:
    facts = row.facts
    programs = row.programs or ("",) * len(COUNTED)
    of_kernel = (
        f"`{facts.kernel}`", DTYPE_NAMES[row.dtype], str(row.head_dim), facts.architecture,
        _tile(facts), str(facts.num_warps), str(facts.num_stages), str(facts.registers),
        str(facts.spills), *programs,
    )  # fmt: skip
    for loop in facts.loops:
        yield (*of_kernel, loop.name, *_span_of_paths(loop))
        of_kernel = ("",) * len(of_kernel)


def _span_of_paths(loop: Loop) -> Iterator[str]:
    """What differs between the shortest and the longest path is shown for both."""

    def counts(found: Mapping[str, int]) -> str:
        return ", ".join(f"{n} {name}" for name, n in found.items()) or "0"

    def cells(turn: Turn) -> tuple[str, ...]:
        return (
            str(turn.instructions), str(turn.barriers), counts(turn.products),
            counts(turn.loads), str(turn.stores),
        )  # fmt: skip

    for least, most in zip(cells(loop.least), cells(loop.most), strict=True):
        yield least if least == most else f"{least} – {most}"


def _summary(rows: Sequence[Row], architectures: Sequence[str]) -> list[str]:
    lines = [
        "| architecture | kernels compiled | most registers | most shared memory | spills | "
        "serialised | without a matrix product |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in architectures:
        facts = [row.facts for row in rows if row.facts.architecture == name]
        shared = max(f.shared for f in facts) / 1024
        lines.append(
            f"| {name} | {len(facts)} | {max(f.registers for f in facts)} | "
            f"{shared:.0f} of {SHARED_LIMIT[name] // 1024} KiB | "
            f"{sum(f.spills > 0 for f in facts) or 'none'} | "
            f"{sum('C7515' in f.remarks for f in facts) or 'none'} | "
            f"{sum(not f.multiplies for f in facts)} |"
        )
    return lines


def markdown(rows: Sequence[Row], versions: dict[str, str]) -> str:
    """The whole file."""
    made = ", ".join(f"{name} {version}" for name, version in versions.items())
    compiled = {row.facts.architecture for row in rows}
    architectures = [name for name in ARCHITECTURES if name in compiled]
    remarks = ", ".join(f"{code}: {meaning}" for code, meaning in REMARKS.items())
    text = [
        "# What the Triton kernels compile to",
        "",
        f"Written by `python -m benchmarks.codegen` with {made}.",
        "",
        "These are facts of the compiler, read from the cubins and the PTX of kernels compiled "
        "ahead of time for GPUs that need not be there, with the tile sizes of the tables in "
        "`triton/tiles.py`. They are no measurement on a GPU: nothing here says how fast a kernel "
        "is.",
        "",
        *_summary(rows, architectures),
        "",
        "A cell: tile (rows x keys, then features and spans) · warps · pipeline stages · registers "
        "a thread · shared memory of a CTA · matrix instruction (`mma` = mma.sync, "
        "`wgmma` = wgmma.mma_async, `tcgen05` = "
        "tcgen05.mma) · TMA where the PTX has tensor copies · what ptxas says of its wgmma "
        f"instructions ({remarks}). Two lines in a cell: the call "
        "launches the kernel in two forms. Variants that compile to the same share a line.",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        head = ["kernel", "dtype", "head dim", "variants", *architectures]
        text += ["", f"## {op}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        text += _lines([row for row in rows if row.op == op], architectures)
    if any(row.facts.loops for row in rows):
        text += ["", "## Main loops", "", LOOPS_ARE, "", *loop_table(rows)]
    return "\n".join(text) + "\n"
