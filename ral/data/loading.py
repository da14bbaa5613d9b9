"""Rows in Video-R1's format as a dataset for TRL."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
from datasets import Dataset, Features, IterableDataset, List, Value

from ral.rewards.tags import check_style

from .errors import MOST_SHOWN, DataError, collected, shown_path
from .evidence import read_evidence
from .frames import FrameFinder, read_images
from .rows import RowReader
from .sources import Record, Source, find_source, opened

_CHUNK = 1024
_logger = logging.getLogger(__name__)

_TEXT = Value("string")
# The columns as they are stored. Their names are those of the rows that are read, so that what
# drops columns by name (transformers' Trainer does) keeps the right ones.
_FEATURES = Features(
    {
        "prompt": List({"role": _TEXT, "content": List({"type": _TEXT, "text": _TEXT})}),
        "images": List(
            {"path": _TEXT, "frame": Value("int64"), "row": Value("int64"), "source": _TEXT}
        ),
        "solution": _TEXT,
        "problem_type": _TEXT,
        "problem_id": _TEXT,
        "options": List(_TEXT),
        "process": _TEXT,
        "evidence": List(
            {
                "image": Value("int64"),
                "box": List(Value("float64")),
                "mask": _TEXT,
                "source": _TEXT,
            }
        ),
    }
)


def load_rows(
    path: str | os.PathLike[str],
    *,
    config: str | None = None,
    split: str = "train",
    image_root: str | os.PathLike[str] | None = None,
    style: str = "think",
    max_frames: int = 16,
    fps: float | None = None,
    streaming: bool = False,
    on_error: str = "raise",
) -> Dataset | IterableDataset:
    """The rows of a data set in Video-R1's format, for TRL's trainers.

    A file of JSON holds a row a line, or one array of rows. A parquet file, a folder that
    `save_to_disk` wrote and a dataset of the Hub hold a column for each field. The fields of a row:

    - `problem`: the question. `<image>` in it, once for each image, says where the images stand;
      one `<video>` stands for all frames.
    - `options`: texts, with or without their letters. Multiple choice needs two or more; other
      types need none.
    - `solution`: with or without `<answer>` tags.
    - `problem_type`: one of `ral.rewards.PROBLEM_TYPES`.
    - `data_type`: "image", "video", or "text" for a row without images.
    - `path`: an image or a list of images. For a video a file such as .mp4 (with PyAV), an animated
      GIF or WebP, or a folder of frames in natural order: frame2 before frame10. For text none.
    - `images` or `image`, in place of `path`, in a parquet file or dataset: pictures that it holds
      itself, as `datasets.Image` stores them. A table need not say `data_type`: "image", or "text"
      for a row without images.
    - `problem_id`, optional.
    - `process`, optional: a worked thinking text for SFT.
    - `evidence`, optional: the parts of the pictures that the answer rests on, a list of mappings:
      {"image": 0, "box": [x0, y0, x1, y1]}, {"image": 1, "mask": "m.png"}, {"frames": [3, 5]} or
      {"video": 0, "frames": [3, 5], "box": ...}. Boxes are in pixels of the given picture, after it
      is turned upright (EXIF). A mask is a file as large as its picture; what is not black belongs
      to it. `frames` names the first and the last frame of the source, from 0: all frames of the
      video, before some are taken. In a row of images it numbers the images.

    Other fields and blank lines are ignored. Every row is checked, and every image file must
    exist, before the function returns. Images are decoded when a row is read; an image that several
    rows of a batch share is decoded once.

    To read other columns without decoding, use `dataset.select_columns("solution")`, or give
    `filter` its `input_columns`; `dataset["solution"]` reads whole rows. To save the dataset or add
    a column, remove decoding with `with_format(None)` and restore it with
    `with_transform(decode_batch)`.

    Args:
        path: a file, a folder, or OWNER/NAME of a dataset on the Hub.
        config, split: of a dataset that has several.
        image_root: the folder of relative paths; by default the file's own, the folder itself, or
            for a name on the Hub the working directory.
        style: the form of response that prompts ask for, "think" or "direct" (RAL-zero).
        max_frames: how many frames of a video are taken at most, at equal steps from the first to
            the last.
        fps: frames a second of a video file or an animation, as far as max_frames allows; None for
            max_frames of any. Folders and lists of frames have no times, and ignore it.
        streaming: return an IterableDataset, which reads and checks row by row. A dataset of the
            Hub is downloaded first, all the same.
        on_error: "raise", or "skip" to leave out rows with errors and log their number. "skip"
            also leaves out rows whose images cannot be decoded. Without `streaming`, threads
            decode every image and mask for that.

    Returns:
        A dataset with the columns prompt (a conversation with images before the text, or where it
        marks them), images (PIL, RGB), solution (bare), problem_type, problem_id, options (texts
        without letters), process (str or None) and evidence. The last is a list for
        `rk.region_weights`: {"image": number of the row's images, "box": ...} or with a "mask",
        a bool array. A part of a video becomes one for each frame that is taken; the number of rows
        whose evidence is in other frames is logged. Rows without evidence have an empty list.

    Raises:
        DataError: invalid rows (the first 20 errors by line, in tables by row, and the number of
            the others), no valid row at all, a broken JSON array, or a dataset that `datasets` does
            not read. When a row is read, an image that cannot be decoded. With `streaming`, each
            error when it is reached. Images that are skipped raise nothing.
        FileNotFoundError: no such file or folder, or image_root is no folder.
        ValueError: another style, max_frames, fps or on_error.
    """
    check_style("load_rows", style)
    if not isinstance(max_frames, int) or isinstance(max_frames, bool) or max_frames < 1:
        raise ValueError(f"load_rows: max_frames must be an integer ≥ 1; got {max_frames!r}")
    if fps is not None and (isinstance(fps, bool) or not 0 < fps < math.inf):
        raise ValueError(f"load_rows: fps must be None or a number > 0; got {fps!r}")
    if on_error not in ("raise", "skip"):
        raise ValueError(f"load_rows: on_error must be 'raise' or 'skip'; got {on_error!r}")
    source = find_source(path, config, split)
    opened.cache_clear()  # what was read before may have changed
    if not source.is_json:
        opened(source)
    root = source.folder if image_root is None else os.path.abspath(image_root)
    if not os.path.isdir(root):
        raise FileNotFoundError(f"load_rows: image_root must be a folder; got {shown_path(root)}")
    arguments: dict[str, Any] = {
        "key": source.key, "root": root, "style": style, "max_frames": max_frames, "fps": fps,
        "skip": on_error == "skip",
    }  # fmt: skip
    dataset: Dataset | IterableDataset
    if streaming:
        dataset = IterableDataset.from_generator(_stream, gen_kwargs=arguments)
    else:
        table = _table(_rows(**arguments))
        if not table.num_rows:
            error = f"{source.path}: rows must be one or more; got none"
            raise collected("load_rows", source.path, [error], 1)
        dataset = Dataset(table).with_transform(decode_batch)
    # By which `RALTrainer` sees whether a resumed run reads the same rows.
    checksums = {source.path: source.checksum()}
    if not streaming:
        checksums[f"{source.path}: sizes of images"] = _sizes_of_images(table)
    dataset.info.download_checksums = checksums
    return dataset


load_jsonl = load_rows  # its name when it read JSON lines alone


def _sizes_of_images(table: pa.Table) -> dict[str, Any]:
    """A checksum of the sizes of all files of images and masks, in the order of the rows.

    Their contents would take minutes to read. Paths and times are left out, because they differ
    where the data were copied. Images in a table are in the table's own checksum.
    """
    images = table["images"].combine_chunks().flatten()
    paths = images.filter(images.field("row").is_null()).field("path").unique().to_pylist()
    masks = table["evidence"].combine_chunks().flatten().field("mask")
    paths += masks.drop_null().unique().to_pylist()
    sizes = [os.path.getsize(path) for path in paths]
    digest = hashlib.sha256(" ".join(map(str, sizes)).encode())
    return {"num_bytes": sum(sizes), "checksum": digest.hexdigest()}


def _table(rows: Iterator[dict[str, Any]]) -> pa.Table:
    # In chunks, since a row of Python objects takes many times its place in the table; and by
    # pyarrow, which builds it several times as fast as `Dataset.from_list`.
    schema = _FEATURES.arrow_schema
    chunks = []
    while chunk := list(itertools.islice(rows, _CHUNK)):
        chunks.append(pa.Table.from_pylist(chunk, schema))
    return pa.concat_tables([schema.empty_table(), *chunks])


def decode_batch(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Rows from stored columns: images decoded, no empty keys in the parts of prompts."""
    if "prompt" in batch:
        batch["prompt"] = [_without_none(prompt) for prompt in batch["prompt"]]
    if "images" in batch:
        decoded: dict[tuple[tuple[str, int], ...], list[Any]] = {}
        rows = []
        for references in batch["images"]:
            # GRPO asks for a row as often as it has rollouts.
            key = tuple(map(_image_key, references))
            if key not in decoded:
                decoded[key] = read_images(references)
            rows.append(list(decoded[key]))
        batch["images"] = rows
    if "evidence" in batch:
        batch["evidence"] = [read_evidence(parts or ()) for parts in batch["evidence"]]
    return batch


def _image_key(reference: dict[str, Any]) -> tuple[Any, ...]:
    """What two references to the same image have in common."""
    return reference["path"], reference["frame"], reference.get("row")


def _without_none(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Arrow gives every part every key; chat templates ask `'text' in part`."""

    def part(stored: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in stored.items() if value is not None}

    return [{**message, "content": list(map(part, message["content"]))} for message in prompt]


def _stream(**arguments: Any) -> Iterator[dict[str, Any]]:
    return _rows(**arguments, streaming=True)


class _Decoded:
    """Checks once for each image whether it can be decoded."""

    def __init__(self) -> None:
        self._errors: dict[tuple[Any, ...], str | None] = {}

    def errors(self, row: dict[str, Any]) -> list[str]:
        """Of the images of a stored row."""
        found = []
        for reference in row["images"]:
            key = _image_key(reference)
            if key not in self._errors:
                try:
                    read_images([reference])
                    self._errors[key] = None
                except DataError as error:
                    self._errors[key] = str(error).removeprefix(f"{reference['source']}: ")
            error_text = self._errors[key]
            if error_text is not None:
                found.append(f"{reference['source']}: {error_text}")
        try:
            read_evidence(row["evidence"])
        except DataError as error:
            found.append(str(error))
        return found


def _in_order(function: Callable[[Any], Any], items: Iterator[Any], threads: int) -> Iterator[Any]:
    """`map`, in threads, whose results wait for no more than the next few."""
    with ThreadPoolExecutor(threads) as pool:
        while chunk := list(itertools.islice(items, 16 * threads)):
            yield from pool.map(function, chunk)


def _rows(
    key: str,
    root: str,
    style: str,
    max_frames: int,
    fps: float | None,
    skip: bool,
    streaming: bool = False,
) -> Iterator[dict[str, Any]]:
    """Rows of the source with this key, with images if streaming.

    Raises the errors of all rows at the end, or the first at once if streaming.
    """
    source = Source.of_key(key)
    reader = RowReader(FrameFinder(root, max_frames, fps), style, None if source.is_json else key)
    decoded = _Decoded()
    stem = os.path.splitext(source.name)[0]
    errors: list[str] = []
    count = left_out = 0

    def read(record: Record) -> dict[str, Any] | list[str]:
        row = reader.read(record, f"{stem}:{record.number}")
        if streaming and isinstance(row, dict):
            try:
                images, evidence = read_images(row["images"]), read_evidence(row["evidence"])
                row = {**row, "images": images, "evidence": evidence}
            except DataError as error:
                row = [str(error)]
        elif skip and isinstance(row, dict):
            row = decoded.errors(row) or row
        return row

    records, threads = source.records(), os.cpu_count() or 1
    try:
        for row in (
            _in_order(read, records, threads) if skip and not streaming else map(read, records)
        ):
            if isinstance(row, dict):
                yield row
                continue
            errors += row[: MOST_SHOWN - len(errors)]
            count += len(row)
            left_out += 1
            if streaming and not skip:
                break
    except DataError as error:  # an array that is broken off
        raise collected("load_rows", source.path, [str(error), *errors], count + 1) from error
    if reader.unseen:
        _logger.warning(
            "load_rows: evidence of %d rows of %s lies in frames that are not taken (max_frames=%d,"
            " fps=%s), first: %s",
            *(len(reader.unseen), source.path, max_frames, fps, reader.unseen[0]),
        )
    if errors and not skip:
        raise collected("load_rows", source.path, errors, count)
    if errors:
        _logger.warning(
            "load_rows: left out %d rows of %s with %d errors, first: %s",
            *(left_out, source.path, count, errors[0]),
        )
