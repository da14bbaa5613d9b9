"""One record of a data set, checked and turned into a row."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ral.rewards import PROBLEM_TYPES, bare_solution, parse_choice, parse_number
from ral.rewards.tags import has_tags

from .errors import DataError, shown
from .evidence import EvidenceReader
from .frames import Found, FrameFinder
from .prompts import conversation, letter, question_text
from .sources import Record, images_of

_DATA_TYPES = ("image", "video", "text")
_OPTION_LETTER = re.compile(
    r"\s*[(\[（【]?([A-Za-zＡ-Ｚａ-ｚ])(?:[)\]）】][.:、．：]?|[.:、．：])\s*(?=\S)"
)


@dataclass
class RowReader:
    """Reads rows of Video-R1's format.

    Args:
        finder: finds the images of a row.
        style: the form of response that the prompts ask for.
        table: key of the table that holds the rows, and may hold their images; None for JSON.

    Attributes:
        unseen: the places of rows whose evidence lies in frames that are not taken.
    """

    finder: FrameFinder
    style: str
    table: str | None = None
    unseen: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._evidence = EvidenceReader(self.finder.root)

    def read(self, record: Record, problem_id: str) -> dict[str, Any] | list[str]:
        """The row of a record, or all its errors.

        Args:
            record: of a `Source`.
            problem_id: the id of a row that has none.

        Returns:
            The row as it is stored, its `images` still references; or a list of errors.
        """
        fields, place = record.content, record.place
        if isinstance(fields, bytes):
            try:
                fields = json.loads(fields)
            except (ValueError, RecursionError) as error:
                return [f"{place}: the line must be a JSON object; got {shown(fields)}: {error}"]
            if not isinstance(fields, dict):
                return [f"{place}: the line must be a JSON object; got {shown(fields)}"]
        checked = _Checked(fields)
        row = self._row(checked, record, problem_id)
        return [f"{place}: {error}" for error in checked.errors] or row

    def _row(self, checked: _Checked, record: Record, problem_id: str) -> dict[str, Any]:
        held = images_of(checked.fields) if self.table is not None else []
        if self.table is not None and checked.fields.get("data_type") is None:
            shows = held or checked.fields.get("path")
            checked.fields = {**checked.fields, "data_type": "image" if shows else "text"}
        problem = checked.text("problem")
        problem_type = checked.one_of("problem_type", PROBLEM_TYPES)
        data_type = checked.one_of("data_type", _DATA_TYPES)
        video = data_type == "video"
        options = checked.options(problem_type)
        solution = checked.solution(problem_type, options)
        process = checked.process()
        given_id = checked.fields.get("problem_id")
        if given_id is not None:
            problem_id = checked.text("problem_id", numbers=True)
        inside = [image.get("bytes") if isinstance(image, dict) else image for image in held]
        contents = [content for content in inside if isinstance(content, bytes)]
        if len(contents) < len(held):
            contents = []
        found, evidence = Found([], [], 0), checked.fields.get("evidence")
        try:
            found = self._found(checked, held, contents, data_type)
        except DataError as error:
            checked.errors.append(str(error))
        if data_type == "text":
            if evidence:
                checked.wrong("evidence", "left out of a row with data_type 'text'")
        elif found.frames:
            evidence, errors = self._evidence.read(evidence, found, contents, video)
            checked.errors += errors
        if checked.errors:
            return {}
        if checked.fields.get("evidence") and not evidence:
            self.unseen.append(record.place)
        row = record.number - 1 if contents else None
        images = [
            {"path": file, "frame": frame, "row": row, "source": record.place}
            for file, frame in found.frames
        ]
        text = question_text(
            problem, problem_type,
            options=options, style=self.style, video=video, num_images=len(images),
        )  # fmt: skip
        try:
            prompt = conversation(text, len(images))
        except DataError as error:
            checked.errors.append(str(error))
            return {}
        return {
            "prompt": prompt,
            "images": images,
            "solution": solution,
            "problem_type": problem_type,
            "problem_id": problem_id,
            "options": options,
            "process": process,
            "evidence": [{**part, "source": record.place} for part in evidence or ()],
        }

    def _found(
        self, checked: _Checked, held: list[Any], contents: list[bytes], data_type: str
    ) -> Found:
        """The images of a row: files, or in the table, which then stands for the file of each."""
        nothing = Found([], [], 0)
        if data_type == "text":
            checked.no_images(held)
            return nothing
        video = data_type == "video"
        if contents:
            inside = [(self.table or "", number) for number in range(len(contents))]
            if video:
                return self.finder.sample(inside)
            return Found(inside, list(range(len(inside))), len(inside))
        if held:
            checked.fields = {**checked.fields, "path": [_path_of(image) for image in held]}
        path = checked.path()
        return self.finder.find(path, video=video) if path else nothing


@dataclass
class _Checked:
    """The fields of a line; errors are collected, not raised."""

    fields: dict[str, Any]
    errors: list[str] = field(default_factory=list)

    def wrong(self, name: str, wanted: str) -> None:
        got = shown(self.fields[name]) if name in self.fields else "nothing"
        self.errors.append(f"{name} must be {wanted}; got {got}")

    def text(self, name: str, *, numbers: bool = False) -> str:
        """A non-empty text; with `numbers`, also a number as text."""
        value: Any = self.fields.get(name)
        if numbers and isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        if _is_text(value):
            return value.strip()
        self.wrong(name, "a text or a number" if numbers else "a text that is not blank")
        return ""

    def one_of(self, name: str, names: Sequence[str]) -> str:
        value = self.fields.get(name)
        if isinstance(value, str) and value in names:
            return value
        self.wrong(name, "one of " + ", ".join(map(repr, names)))
        return ""

    def options(self, problem_type: str) -> list[str]:
        """The options, without the letters "A. " that they may begin with."""
        options: Any = self.fields.get("options") or []
        if not isinstance(options, list) or not all(map(_is_text, options)):
            self.wrong("options", "a list of texts that are not blank")
            return []
        if problem_type == "multiple choice" and not 2 <= len(options) <= 26:
            self.wrong("options", "2 to 26 texts for multiple choice")
        letters = [_OPTION_LETTER.match(option) for option in options]
        given = [match and unicodedata.normalize("NFKC", match[1]).upper() for match in letters]
        if given == [letter(i) for i in range(len(options))]:
            options = [_OPTION_LETTER.sub("", option, count=1) for option in options]
        return [option.strip() for option in options]

    def solution(self, problem_type: str, options: Sequence[str]) -> str:
        """The solution without tags, in a form that can be right."""
        given = self.text("solution", numbers=True)
        if not given:
            return ""
        solution = bare_solution(given)
        if not solution or has_tags(solution):
            self.wrong("solution", "one answer, bare or between <answer> and </answer>")
        elif problem_type == "multiple choice":
            choice = parse_choice(solution, options)
            if choice is None or (options and choice > letter(len(options) - 1)):
                last = letter(len(options) - 1) if options else "Z"
                self.wrong("solution", f"the letter of an option, A to {last}")
            return choice or ""
        elif problem_type in ("numerical", "regression") and parse_number(solution) is None:
            self.wrong("solution", "one finite number")
        return solution

    def process(self) -> str | None:
        """The thinking without `<think>` tags around it, None where there is none."""
        process: Any = self.fields.get("process")
        if process is None or (isinstance(process, str) and not process.strip()):
            return None
        if not _is_text(process):
            self.wrong("process", "a text, or nothing")
            return None
        process = process.strip().removeprefix("<think>").removesuffix("</think>").strip()
        if not process or has_tags(process):
            self.wrong("process", "one thinking text, bare or between <think> and </think>")
        return process

    def no_images(self, held: list[Any]) -> None:
        """A row of text shows none."""
        for name in ("path", "images", "image"):
            if self.fields.get(name) and (held or name == "path"):
                self.wrong(name, "left out of a row with data_type 'text'")

    def path(self) -> str | list[str]:
        path: Any = self.fields.get("path")
        if _is_text(path) or (isinstance(path, list) and path and all(map(_is_text, path))):
            return path
        self.wrong(
            "path", "the path of an image, animation or folder of frames, or a list of images"
        )
        return ""


def _path_of(image: Any) -> Any:
    """The file of an image that a table names and does not hold."""
    return image.get("path") if isinstance(image, dict) else image


def _is_text(value: object) -> bool:
    """Whether a value is a string, not blank, that can be written as UTF-8."""
    # JSON can hold half a surrogate pair, which no Arrow table can.
    return isinstance(value, str) and bool(value.strip()) and not _SURROGATE.search(value)


_SURROGATE = re.compile("[\ud800-\udfff]")
