"""What one worker process is asked for, point by point, and what may be asked.

A point is one measurement with a time after which it counts as hung. Points that share a process
form a unit: one backend, one size, one contestant. supervise.py runs units.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from . import small

BFLOAT16 = "bfloat16"
QWEN_3B, QWEN_7B = (16, 2, 128), (28, 4, 128)  # query heads, kv heads, head dim
SIZES = (65536, 16384, 4096)  # largest first: the least likely to fit is known first
SMALL_SIZES = {65536: 384, 16384: 320, 4096: 256}  # in a rehearsal
LAYOUTS = ("none", "aligned", "offset")
SHORT_FRAMES = ("64", "16")  # tokens a frame; 16 of them at 64k would need 15 GB of marginals
MODES = ("forward", "forward+backward")
# What a contestant of the sweeps is called here, without and with spans, and its environment.
CONTESTANTS: dict[str, tuple[str, str, dict[str, str]]] = {
    "cudnn": ("sdpa_cudnn", "", {}),
    "triton": ("ral_plain", "ral", {}),
    "hopper": ("ral_plain_cuda", "ral_cuda", {"RAL_CUDA_HOPPER": "1"}),
    "cuda": ("ral_plain_cuda", "ral_cuda", {}),
    "flash": ("sdpa_flash", "", {}),
}
RAL_CONTESTANTS = ("ral", "ral_cuda", "ral_again", "chunked_256", "chunked_64")
ROWS = 1024
PER_PROCESS = 4  # ops; their kernels come from the cache, and a process takes as long to start


@dataclass(frozen=True)
class Point:
    """One measurement: `kind` is a function of work.py, `settings` its arguments."""

    name: str
    kind: str
    limit: float  # seconds
    settings: dict[str, Any]


@dataclass(frozen=True)
class Unit:
    """Points of one process, in order, and the process's environment.

    Units of a `group` run the same kernels: after one has lost a process, the others wait.
    """

    name: str
    points: tuple[Point, ...]
    environment: dict[str, str] = field(default_factory=dict)
    group: str = ""
    deaths: int = 2  # of its processes, after which its other points are given up


def each_op(rehearse: bool) -> list[Unit]:
    """Every op once against float64, a few a process; what matters most first."""
    seqlen = 33 if rehearse else 200
    units = []
    for backend in small.BACKENDS:
        made = []
        for call in small.calls(backend):
            for head_dim in (128, 256) if small.is_wide(backend, call) else (128,):
                name = f"{backend} {call} {BFLOAT16} {head_dim}"
                settings = {
                    "backend": backend, "call": call, "dtype": BFLOAT16, "head_dim": head_dim,
                    "seqlen": seqlen,
                }  # fmt: skip
                made.append(Point(name, "check", 30.0, settings))
        made.sort(key=lambda point: _value(point.name))
        parts = -(-len(made) // PER_PROCESS)
        for part in range(parts):
            units.append(Unit(f"{backend} ops {part + 1}", tuple(made[part::parts]), deaths=4))
    return units


def _value(name: str) -> int:
    """The common calls of the main ops first; sorting is stable."""
    firsts = ("attention spans", "loss jsd", "policy over keys", "attention no spans")
    return next((i for i, first in enumerate(firsts) if first in name), len(firsts))


def attention_times(rehearse: bool) -> list[Unit]:
    """Forward and backward of attention by size, heads, contestant and layout."""
    units = []
    for heads, seqlen in ((h, n) for h in (QWEN_3B, QWEN_7B) for n in SIZES):
        for short, (plain, spanned, environment) in CONTESTANTS.items():
            layouts: tuple[str, ...] = LAYOUTS if spanned else LAYOUTS[:1]
            if spanned and seqlen < SIZES[0] and heads == QWEN_3B:
                layouts += SHORT_FRAMES
            points = tuple(
                _time_point(short, plain if layout == "none" else spanned, heads, seqlen, layout,
                            mode, rehearse)
                for mode in MODES
                for layout in layouts
            )  # fmt: skip
            name = f"{short} {heads[0]}:{heads[1]} {seqlen}"
            units.append(Unit(name, points, environment, short))
    return units


def _time_point(
    short: str,
    contestant: str,
    heads: Sequence[int],
    seqlen: int,
    layout: str,
    mode: str,
    rehearse: bool,
) -> Point:
    name = f"{short} {heads[0]}:{heads[1]} {seqlen} {layout} {mode}"
    settings: dict[str, Any] = {
        "objective": "attention",
        "contestant": contestant,
        "layout": layout,
        "mode": mode,
    }
    settings["peer"] = None if short == "cudnn" else "sdpa_cudnn"
    settings |= _size(heads, seqlen, rehearse)
    limit = 40.0 if seqlen == SIZES[0] else 20.0
    return Point(name, "time", limit, settings)


def _size(heads: Sequence[int], seqlen: int, rehearse: bool) -> dict[str, Any]:
    """In a rehearsal few heads and keys."""
    if not rehearse:
        return {"heads": list(heads), "seqlen": seqlen}
    return {"heads": [2, 1, heads[2]], "seqlen": SMALL_SIZES[seqlen]}


def ral_times(rehearse: bool) -> list[Unit]:
    """The token-level loss, 1,024 rows."""
    units = []
    for seqlen in SIZES:
        for contestant in RAL_CONTESTANTS:
            name = f"loss {contestant} 16:2 {seqlen}"
            settings: dict[str, Any] = {
                "objective": "ral",
                "contestant": contestant,
                "layout": "offset",
            }
            settings["peer"] = None if contestant == "chunked_256" else "chunked_256"
            settings["rows"] = 16 if rehearse else ROWS
            settings |= _size(QWEN_3B, seqlen, rehearse)
            points = (
                Point(f"{name} {mode}", "time", 40.0, {**settings, "mode": mode}) for mode in MODES
            )
            units.append(Unit(name, tuple(points), group=contestant))
    return units


# Picked by hand from what the compiler says (registers, stages, programs): the table's own first.
# Each is compared by the time of the whole call, at 16:2 heads and 16,384 keys.
TILES: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "bwd_dkdv": ((16, 128, 8, 2), (32, 128, 8, 2), (32, 64, 8, 2), (64, 64, 8, 2)),
    "bwd_dq": ((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 2)),
    "fwd": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)),
}


def tiles(rehearse: bool) -> list[Unit]:
    """Block sizes of the kernels of attention, dk/dv first; each is compiled beforehand."""
    units = []
    for layout in ("none", "offset"):
        for kernel, candidates in TILES.items():
            points = []
            for tile in candidates:
                settings = {"kernel": kernel, "tile": list(tile), "layout": layout}
                settings |= _size(QWEN_3B, SIZES[1], rehearse)
                name = f"tile {kernel} {'x'.join(map(str, tile))} {layout}"
                points.append(Point(name, "tile", 20.0, settings))
            units.append(Unit(f"tile {kernel} {layout}", tuple(points)))
    return units


PROFILED = "attention_(fwd|bwd_dkdv)"  # the kernels' names, as a regular expression


def profiles(rehearse: bool) -> Iterator[tuple[str, Point, dict[str, str]]]:
    """(name, call, environment) for Nsight Compute."""
    for short in ("triton", "hopper"):
        _, spanned, environment = CONTESTANTS[short]
        point = _time_point(short, spanned, QWEN_3B, SIZES[1], "offset", MODES[1], rehearse)
        yield short, replace(point, kind="profile", limit=60.0), environment
