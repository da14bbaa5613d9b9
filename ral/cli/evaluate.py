"""`eval`: accuracy over frames and resolution."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from ..data import load_rows
from ..evaluation import Cell, as_json, as_table, plot, score
from ..models import default_dtype, limit_pixels, load_model, load_processor
from .errors import Refused, refusing
from .hub import check_model_name
from .parsing import Settings
from .settings import DIGITS_EVAL_ROWS, EvalSettings
from .sources import data_source, digits_task, known_data

if TYPE_CHECKING:
    from ..digits.tasks import Style

DIGITS_TOKENS, TOKENS = 24, 768


def evaluate(settings: Settings) -> int:
    """Print a table, and write it as JSON and as a picture if one is asked for."""
    given: EvalSettings = settings.build(EvalSettings)
    if given.model is None:
        raise Refused("model must be given: a folder, or a name on the Hub")
    if given.data is None:
        raise Refused(f"data must be given: {known_data()}")
    check_model_name(given.model)
    task = digits_task(given.data)
    source = data_source(given.data) if task is None else ""
    if given.plot is not None:
        _check_parent("plot", given.plot)
    if given.out is not None:
        _check_parent("out", given.out)
    model, processor = _load(given)
    cells = []
    for cell, rows in _cells(given, task, source, processor):
        with refusing(f"cannot evaluate {given.model}"):
            cells.append(
                Cell(**cell, score=_score(given, task, model, processor, rows, _name(cell)))
            )
    print(as_table(cells))
    _write(given, cells)
    return 0


def _load(given: EvalSettings) -> tuple[Any, Any]:
    import torch

    name = str(given.model)
    with refusing(f"cannot load {name}"):
        processor = load_processor(name, trust_remote_code=given.trust_remote_code)
        model = load_model(
            name, dtype=given.dtype or default_dtype(),
            attn_implementation=given.attn_implementation,
            trust_remote_code=given.trust_remote_code,
        )  # fmt: skip
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model.to(device).eval(), processor
    except (RuntimeError, AssertionError) as error:  # torch asserts that CUDA is compiled in
        raise Refused(f"device {device}: {str(error).splitlines()[0]}") from error


def _cells(
    given: EvalSettings, task: Any, source: str, processor: Any
) -> Iterator[tuple[dict, Any]]:
    """Sizes and rows of each entry of the table."""
    if task is not None:
        if given.max_pixels:
            raise Refused("max_pixels needs other data than digits, which have one size")
        from ..digits.evaluate import EXTENTS
        from ..digits.puzzles import STILL
        from ..digits.tasks import make_dataset

        is_still = task in STILL
        if given.frames if is_still else given.grids:
            raise Refused(f"{given.data} takes {'grids' if is_still else 'frames'} only")
        size = "grid" if is_still else "frames"
        for extent in given.grids or given.frames or EXTENTS[task]:
            with refusing():
                rows = make_dataset(
                    task, size=given.rows or DIGITS_EVAL_ROWS, split="test", seed=given.seed,
                    style=cast("Style", given.style), grid=extent, frames=extent,
                )  # fmt: skip
            yield {"frames": None, "grid": None, "max_pixels": None, size: extent}, rows
        return
    if given.grids:
        raise Refused("grids needs data=digits:cell or digits:chain_cells")
    for frames in given.frames or [16]:
        with refusing():
            rows = load_rows(
                source, config=given.data_config, split=given.data_split,
                image_root=given.image_root, style=given.style, max_frames=frames, fps=given.fps,
            )  # fmt: skip
        if given.rows:
            rows = rows.select(range(min(given.rows, len(rows))))
        limits: list[Any] = [*given.max_pixels] or [None]
        for pixels in limits:
            with refusing():
                limit_pixels(processor, max_pixels=pixels)
            yield {"frames": frames, "grid": None, "max_pixels": pixels}, rows


def _score(given: EvalSettings, task: Any, model: Any, processor: Any, rows: Any, what: str) -> Any:
    from tqdm import tqdm

    with tqdm(total=len(rows), desc=what, leave=False, disable=not sys.stderr.isatty()) as bar:
        return score(
            model,
            processor,
            rows,
            style=given.style,
            batch_size=given.batch_size,
            max_new_tokens=given.max_new_tokens or (TOKENS if task is None else DIGITS_TOKENS),
            on_batch=bar.update,
        )


def _name(cell: dict[str, Any]) -> str:
    return ", ".join(
        f"{value} {name.replace('_', ' ')}" for name, value in cell.items() if value is not None
    )


def _check_parent(name: str, path: str) -> None:
    if not Path(path).expanduser().absolute().parent.is_dir():
        raise Refused(f"{name}: there is no folder {Path(path).parent}")


def _write(given: EvalSettings, cells: list[Cell]) -> None:
    model = Path(str(given.model))
    out = given.out and Path(given.out).expanduser()
    if out is None and model.is_dir():
        out = model / f"eval-{Path(str(given.data)).stem.replace(':', '-')}.json"
    if out:
        content = {
            "model": str(given.model),
            "data": str(given.data),
            "style": given.style,
            "results": as_json(cells),
        }
        with refusing():
            Path(out).write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        print(out)
    if given.plot is not None:
        with refusing():
            plot(cells, Path(given.plot).expanduser(), title=f"{model.name} on {given.data}")
        print(given.plot)
