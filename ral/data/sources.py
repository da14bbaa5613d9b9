"""Where rows come from: JSON lines, a JSON array, parquet, a saved dataset, a name on the Hub."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from .errors import DataError, shown, shown_path

FILES = (".jsonl", ".ndjson", ".json", ".parquet")
IMAGE_COLUMNS = ("images", "image")
_ROWS = 64  # of a table that are Python objects at a time
_SPACE = re.compile(r"\s*")
_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors write


@dataclass(frozen=True)
class Record:
    """One row as its source has it.

    Attributes:
        number: from 1, for the id of a row that has none: of a line, or of a row.
        place: "file:line" in JSON, where the row begins; else "file:row".
        content: the JSON text, or the fields.
    """

    number: int
    place: str
    content: bytes | dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A data set by what names it; `records` and `files` read it.

    Attributes:
        path: an absolute path, or a name on the Hub.
        config: of a dataset with several configurations.
        split: of a dataset with several splits.
    """

    path: str
    config: str | None = None
    split: str = "train"

    @classmethod
    def of_key(cls, key: str) -> Source:
        """The source whose `key` it is."""
        path, config, split = key.rsplit("::", 2)
        return cls(path, config or None, split)

    @property
    def key(self) -> str:
        """All of it in one text, as rows name the table that holds their images."""
        return "::".join((self.path, self.config or "", self.split))

    @property
    def is_json(self) -> bool:
        """Whether it is a file of JSON, and no Arrow table."""
        return os.path.isfile(self.path) and not self.path.lower().endswith(".parquet")

    @property
    def folder(self) -> str:
        """The folder that the paths in its rows are relative to."""
        if os.path.isdir(self.path):
            return self.path
        return os.path.dirname(self.path) if os.path.isfile(self.path) else os.getcwd()

    @property
    def name(self) -> str:
        """Short, for errors and ids."""
        return os.path.basename(self.path.rstrip("/")) if os.path.exists(self.path) else self.path

    def records(self) -> Iterator[Record]:
        """All rows in order.

        Raises:
            DataError: a JSON array that is broken off, or no Arrow table.
        """
        if not self.is_json:
            tables = opened(self).iter(_ROWS)
            rows = (row for table in tables for row in table.to_pylist())
            for number, row in enumerate(rows, start=1):
                yield Record(number, f"{self.name}:{number}", row)
            return
        with open(self.path, "rb") as file:
            begins = file.read(4096).removeprefix(_MARK).lstrip()
            file.seek(0)
            if begins.startswith(b"["):
                yield from _array(self.name, file.read())
                return
            for number, line in enumerate(file, start=1):
                content = line.removeprefix(_MARK) if number == 1 else line
                if content.strip():
                    yield Record(number, f"{self.name}:{number}", content)

    def checksum(self) -> dict[str, Any]:
        """Size and SHA-256 of its contents, in the form of `datasets`' download_checksums."""
        if os.path.isfile(self.path):
            paths = [self.path]
        else:
            paths = [file["filename"] for file in opened(self).cache_files]
        digest, size = hashlib.sha256(), 0
        for path in paths:
            with open(path, "rb") as file:
                while part := file.read(1 << 20):
                    digest.update(part)
                    size += len(part)
        return {"num_bytes": size, "checksum": digest.hexdigest()}


def find_source(path: str | os.PathLike[str], config: str | None, split: str) -> Source:
    """The source that a path or a name on the Hub stands for.

    Raises:
        FileNotFoundError: there is no such file or folder, and it cannot be a name on the Hub.
    """
    text = os.path.expanduser(os.fspath(path))
    if os.path.exists(text):
        return Source(os.path.abspath(text), config, split)
    if not may_be_on_hub(text) or text.lower().endswith(FILES):
        raise FileNotFoundError(
            "load_rows: path must be a file of JSON lines, a JSON array, a parquet file, a folder "
            f"of `datasets`, or a name on the Hub; got {shown_path(text)}"
        )
    return Source(text, config, split)


def may_be_on_hub(name: str) -> bool:
    """Whether a name can be OWNER/NAME on the Hub, and is no path below a folder that is here."""
    owner, slash, _ = name.partition("/")
    return (
        name.count("/") == 1 and bool(slash) and name[0] not in "./~" and not os.path.isdir(owner)
    )


@lru_cache(maxsize=8)
def opened(source: Source) -> Dataset:
    """A source of Arrow tables, mapped from disk, whose rows come as tables.

    Raises:
        DataError: it is none, or has no such split.
    """
    path = source.path
    try:
        if os.path.isfile(path):
            found: Any = Dataset.from_parquet(path)
        elif os.path.isdir(path) and _is_saved(path):
            found = load_from_disk(path)
        else:
            found = load_dataset(path, source.config, split=source.split)
        if isinstance(found, DatasetDict):
            if source.split not in found:
                raise ValueError(f"split must be one of {', '.join(found)}; got {source.split!r}")
            found = found[source.split]
    except Exception as error:  # of pyarrow, of `datasets`, of the Hub
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"load_rows: {shown_path(path)} must be a dataset that `datasets` reads: {reason}"
        ) from error
    return found.with_format("arrow")  # which decodes no image


def stored_images(key: str, row: int) -> list[bytes]:
    """The contents of the images that a row of a table holds itself.

    Args:
        key: of the `Source`.
        row: from 0.
    """
    dataset = opened(Source.of_key(key))
    names = [name for name in IMAGE_COLUMNS if name in dataset.column_names]
    images = images_of(dataset.select_columns(names)[row].to_pylist()[0])
    return [image["bytes"] if isinstance(image, dict) else image for image in images]


def images_of(fields: Mapping[str, Any]) -> list[Any]:
    """The images that the row of a table holds itself: bytes, or dicts with "bytes" and "path"."""
    given: Any = next((fields[n] for n in IMAGE_COLUMNS if fields.get(n) is not None), [])
    return given if isinstance(given, list) else [given]


def _is_saved(folder: str) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return any(
        os.path.isfile(os.path.join(folder, name)) for name in ("state.json", "dataset_dict.json")
    )


def _array(name: str, content: bytes) -> Iterator[Record]:
    """The rows of a JSON array, one after the other, so that an error names its line."""
    try:
        text = content.removeprefix(_MARK).decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{line}: the file must be text in UTF-8; got {error}") from error
    decoder, line, counted = json.JSONDecoder(), 1, 0

    def skip_space(place: int) -> int:
        nonlocal line, counted
        space = _SPACE.match(text, place)
        assert space is not None
        line, counted = line + text.count("\n", counted, space.end()), space.end()
        return counted

    def wrong(wanted: str, place: int) -> DataError:
        return DataError(f"{name}:{line}: {wanted}; got {shown(text[place : place + 80])}")

    place = skip_space(text.index("[") + 1)
    number = 0
    while number or not text.startswith("]", place):
        number += 1
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise wrong(
                f"row {number} of the array must be a JSON object ({error})", place
            ) from error
        fields = value if isinstance(value, dict) else text[place:end].encode()
        yield Record(number, f"{name}:{line}", fields)
        place = skip_space(end)
        if text.startswith("]", place):
            break
        if not text.startswith(",", place):
            raise wrong(f"the array must go on with , or ] after row {number}", place)
        place = skip_space(place + 1)
    rest = skip_space(place + 1)
    if rest < len(text):
        raise wrong("nothing must follow the array", rest)
