"""The command line of both sweeps, and the loop over sizes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..problems import OBJECTIVES
from . import layouts, machine, report, results
from .inputs import Heads, LayerInputs
from .measure import MODES, Sweep
from .objective import Objective, Problem

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float32", "float16")}
# for measuring; imports, the model, the plot and the layouts come on top
DEFAULT_SECONDS = 180.0
QUICK_SECONDS = 30.0
FULL_SECONDS = 3 * 3600.0
LAYOUT_SHARE = 0.2  # of a size's time, for each of ours that is measured in the layouts
LAYOUT_ROTATIONS = 4  # for each of --repeats: a cost of percents shows in more of them


@dataclass(frozen=True)
class Size:
    """One point of a sweep."""

    name: str  # "16 frames"
    axis: dict[str, int]  # {"frames": 16}: the JSON's own field of the sweep
    visual_tokens: int  # expected; the order of sizes and the share of the time follow it
    make: Callable[[], LayerInputs]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of every sweep."""

    def add(name: str, text: str, **options: Any) -> None:
        if options.get("default") is not None:
            text += " (default: %(default)s)"
        parser.add_argument(name, help=text, **options)

    add("--objective", "what is computed", choices=OBJECTIVES, default="attention")
    rows = {name: o.default_rows for name, o in OBJECTIVES.items() if o.default_rows is not None}
    defaults = ", ".join(f"{name}: {count}" for name, count in rows.items())
    add("--rows", f"response rows at the end of the prompt (default: {defaults})", type=int)
    add("--input", "where q, k, v come from", choices=("model", "random"), default="model")
    names = ",".join(layouts.FRAME_TOKENS)
    add(
        "--layouts",
        f"span layouts in which the cost of marginals is measured as well (default: {names})",
        metavar="A,B|none",
    )
    add(
        "--layout",
        "of the spans of --input random (default: those of the sweep, without text)",
        choices=layouts.FRAME_TOKENS,
    )
    add("--full", "more sizes, and as long as it takes", action="store_true")
    add("--dtype", "of q, k, v and the model", choices=DTYPES, default="bfloat16")
    add("--device", "cpu or cuda", default="cpu")
    add("--threads", "threads of torch (default: torch's own choice)", type=int)
    add("--repeats", "rotations at most, each contestant once in each", type=int, default=5)
    add(
        "--budget",
        f"seconds to measure (default: {DEFAULT_SECONDS:.0f} and the layouts', with --full hours, "
        f"with --quick {QUICK_SECONDS:.0f})",
        type=float,
    )
    names = "; ".join(f"{name}: {', '.join(OBJECTIVES[name].registry)}" for name in OBJECTIVES)
    add("--contestants", f"some of the objective's (default: all that fit). {names}", metavar="A,B")
    add("--no-backward", "forward only", action="store_true")
    add("--heads", "query heads", type=int, default=16)
    add("--kv-heads", "key and value heads", type=int, default=2)
    add("--head-dim", "of q, k and v", type=int, default=128)
    results.add_arguments(parser, quick="two small sizes, no layouts")
    add("--no-plot", "no PNG beside the JSON", action="store_true")


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and check what argparse cannot."""
    options = results.parse(parser, arguments, always=("objective", "dtype"))
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    if options.repeats < 1:
        parser.error("--repeats must be at least 1")
    objective = OBJECTIVES[options.objective]
    if options.rows is None:
        options.rows = objective.default_rows
    elif objective.default_rows is None:
        parser.error(f"--rows: --objective {objective.name} is over all rows")
    elif options.rows < 1:
        parser.error("--rows must be at least 1")
    names = objective.default_names(options.device)
    if options.contestants is not None:
        names = [name.strip() for name in options.contestants.split(",") if name.strip()]
    unknown = [name for name in names if name not in objective.registry]
    if unknown:
        parser.error(
            f"--contestants: {', '.join(unknown)} unknown; --objective {objective.name} has "
            f"{', '.join(objective.registry)}"
        )
    options.contestants = names
    options.layouts = _layouts(parser, options, objective)
    if options.layout is not None and options.input != "random":
        parser.error("--layout: only --input random has no spans of its own")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    return options


def _layouts(
    parser: argparse.ArgumentParser, options: argparse.Namespace, objective: Objective
) -> list[str]:
    if options.layouts is None:
        return list(layouts.FRAME_TOKENS) if objective.layout_pairs and not options.quick else []
    if options.layouts == "none":
        return []
    if not objective.layout_pairs:
        parser.error(f"--layouts: --objective {objective.name} has no spans")
    names = [name.strip() for name in options.layouts.split(",")]
    unknown = [name for name in names if name not in layouts.FRAME_TOKENS]
    if unknown:
        known = ", ".join(layouts.FRAME_TOKENS)
        parser.error(f"--layouts: {', '.join(unknown)} unknown; there are {known}, or none")
    return names


def heads_of(options: argparse.Namespace) -> Heads:
    return Heads(options.heads, options.kv_heads, options.head_dim)


def run_sweep(
    benchmark: str, options: argparse.Namespace, sizes: Sequence[Size], extra: dict[str, Any]
) -> int:
    """Measure all sizes, print the tables, write JSON and PNG; the exit status of the script.

    Args:
        benchmark: the script's name.
        options: as `parse` returns them.
        sizes: what to measure.
        extra: settings of this sweep alone, for the JSON.
    """
    objective = OBJECTIVES[options.objective]
    device = torch.device(options.device)
    modes = [mode for mode, backward in MODES.items() if not (backward and options.no_backward)]
    sizes = sorted(sizes, key=lambda size: size.visual_tokens)
    settings = {
        "input": options.input,
        "dtype": options.dtype,
        "device": options.device,
        "repeats": options.repeats,
        "heads": asdict(heads_of(options)),
        "modes": modes,
        "rows": options.rows,
        "layout": options.layout,
        "layouts": options.layouts,
        **extra,
    }
    run = results.begin(benchmark, options, settings, device)
    run |= {"objective": objective.name, "schema": 1, "sizes": []}
    print(report.problem(run), flush=True)
    file: Path | None = None
    # disable=None: no bar where stderr is a file, which a bar would fill with its frames
    with tqdm(unit="step", dynamic_ncols=True, leave=False, disable=None) as bar:
        sweep = Sweep(
            objective,
            options.contestants,
            modes,
            options.repeats,
            device,
            DTYPES[options.dtype],
            lambda what: _advance(bar, what),
        )
        in_layouts = _layout_sweeps(sweep, options)
        main_share = 1 - LAYOUT_SHARE * len(in_layouts)
        default = FULL_SECONDS if options.full else DEFAULT_SECONDS / main_share
        default = QUICK_SECONDS if options.quick else default
        deadline = time.perf_counter() + (options.budget or default)
        bar.total = len(sizes) * sum(one.steps_per_size for one in (sweep, *in_layouts))
        try:
            for index, size in enumerate(sizes):
                bar.set_description(size.name)
                bar.set_postfix_str("inputs")
                problem = objective.make(laid_out(size.make(), options.layout), options.rows)
                weights = [s.visual_tokens**2 for s in sizes[index:]]
                left = max(deadline - time.perf_counter(), 10.0)
                # a floor for small sizes, whose time is start-up and compilation rather than N^2
                floor = QUICK_SECONDS / 4 if options.quick else 20.0
                share = min(max(left * weights[0] / sum(weights), floor), left)
                run["sizes"].append(_measure(sweep, in_layouts, size, problem, share))
                file = file or results.new_file(run, options)
                results.save(run, file)  # after each size, so that a killed run keeps what it has
                bar.write(f"\n{report.table(objective, run['sizes'][-1])}", file=sys.stdout)
        finally:
            sweep.close()
    return _finish(objective, options, run, file)


def laid_out(layer: LayerInputs, layout: str | None) -> LayerInputs:
    """The layer with the spans of a layout, or as it is.

    Raises:
        ValueError: no frame fits into the keys.
    """
    if layout is None:
        return layer
    spans = layouts.spans_of(layout, layer.k.shape[2])
    if spans.num_spans == 0:
        raise ValueError(f"--layout {layout}: no frame fits into {layer.k.shape[2]} keys")
    return replace(layer, spans=spans)


def _advance(bar: Any, what: str) -> None:
    bar.update()
    if what:
        bar.set_postfix_str(what)


def _layout_sweeps(sweep: Sweep, options: argparse.Namespace) -> list[Sweep]:
    """For each of ours that takes part: itself in the layouts, beside itself without spans."""
    return [
        Sweep(
            replace(sweep.objective, peers=(plain,), cuda_peers=()),
            [f"{ours}_{layout}" for layout in options.layouts],
            sweep.modes,
            LAYOUT_ROTATIONS * sweep.repeats,
            sweep.device,
            sweep.dtype,
            sweep.advance,
            sweep.processes,
        )
        for ours, plain in sweep.objective.layout_pairs.items()
        if ours in options.contestants and options.layouts
    ]


def _measure(
    sweep: Sweep, in_layouts: Sequence[Sweep], size: Size, problem: Problem, share: float
) -> dict[str, Any]:
    measured = sweep.run(problem, share * (1 - LAYOUT_SHARE * len(in_layouts)))
    rows = [row for one in in_layouts for row in one.run(problem, share * LAYOUT_SHARE, sweep.gemm)]
    for row in rows:
        answer = sweep.objective.registry[row["contestant"]].answer
        if answer in layouts.FRAME_TOKENS:
            row.update(layouts.facts(answer, problem.seqlen))
    return {
        "name": size.name,
        **size.axis,
        "visual_tokens": int((problem.span_ids >= 0).sum()),
        "seqlen": problem.seqlen,
        **sweep.objective.facts(problem),
        "gemm_gflops": sweep.gemm,
        **({"gpu_state": machine.gpu_state()} if problem.q.is_cuda else {}),
        "peer": sweep.peer,
        "results": measured,
        **({"layouts": rows} if rows else {}),
    }


def _finish(
    objective: Objective, options: argparse.Namespace, run: dict[str, Any], file: Path | None
) -> int:
    file = results.finish(run, options, file)
    if not options.no_plot:
        from . import plot

        print(f"drew {plot.draw(file)}")
    wrong = report.mistakes(objective, run)
    for line in wrong:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if wrong else 0
