"""What documents say a reader can do: their blocks run, their commands exist, their files too.

Every block names its language.

- `python` blocks run, those of a document in one namespace. What one prints stands in a `text`
  block right after it; numbers may differ by 1 %. A block after `<!-- not run: why -->` is only
  compiled.
- Commands, modules, options, make targets and presets of a `sh` block must exist; nothing runs.
- Each line of a `json` block must parse.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import json
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from . import cited_files

ROOT = cited_files.ROOT
QUICKSTART = "docs/quickstart.md"
RUN = (
    "README.md", QUICKSTART, "docs/install.md", "ral/README.md",
    "ral_kernels/integrations/README.md", "docs/evidence.md",
)  # fmt: skip
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
OTHERS = ("CONTRIBUTING.md", "benchmarks/README.md", "benchmarks/gpu/README.md")
DOCUMENTS = tuple(dict.fromkeys((*RUN, *PAGES, *OTHERS)))
NOT_RUN = re.compile(r"<!-- not run: (.+?) -->")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
# Commands beside python and make, which are looked up in the tree.
PROGRAMS = {"pip", "accelerate", "git", "vllm", ".venv/bin/pre-commit"}


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    line: int
    language: str
    text: str
    not_run: str | None  # why

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str) -> list[Block]:
    found: list[Block] = []
    before, language, start = "", "", 0
    inside: list[str] | None = None
    for number, line in enumerate((ROOT / document).read_text().splitlines(), 1):
        if line.lstrip().startswith("```"):
            if inside is None:
                language, inside, start = line.strip().strip("`"), [], number
            else:
                reason = NOT_RUN.search(before)
                why = reason.group(1) if reason else None
                found.append(Block(document, start, language, "\n".join(inside) + "\n", why))
                before, inside = "", None
        elif inside is not None:
            inside.append(line)
        elif line.strip():
            before = line
    return found


def of_language(language: str, documents: tuple[str, ...] = DOCUMENTS) -> list[Any]:
    return [
        pytest.param(block, id=block.name)
        for document in documents
        for block in blocks(document)
        if block.language == language
    ]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_block_names_its_language(document: str) -> None:
    languages = {block.language for block in blocks(document)}
    assert languages <= {"python", "text", "sh", "json"}


@pytest.mark.parametrize("document", RUN)
def test_python_blocks_compile(document: str) -> None:
    for block in blocks(document):
        if block.language == "python":
            compile(block.text, block.name, "exec")


slow = pytest.mark.slow(stands_in="test_python_blocks_compile")  # it loads transformers, trains


@pytest.mark.parametrize(
    "document", [pytest.param(name, marks=slow if name == QUICKSTART else ()) for name in RUN]
)
def test_python_blocks_run_and_print_what_is_shown(
    document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where blocks write their pictures
    names: dict[str, Any] = {}
    found = blocks(document)
    for index, block in enumerate(found):
        if block.language != "python":
            continue
        if block.not_run is not None:
            continue
        code = compile(block.text, block.name, "exec")
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        after = found[index + 1] if index + 1 < len(found) else None
        gap = after is not None and after.line - block.line - block.text.count("\n") == 3
        shown = after.text if after and after.language == "text" and gap else ""
        compare(printed.getvalue(), shown, block.name)
    compare_pictures(tmp_path, ROOT / "docs" / "pictures")


def compare_pictures(made: Path, shown: Path) -> None:
    """A document shows what its blocks write: pictures of the same name and the same size."""
    from PIL import Image

    for path in made.glob("*.png"):
        with Image.open(path) as new, Image.open(shown / path.name) as old:
            assert new.size == old.size, f"{path.name} is {new.size}, the document's {old.size}"


def compare(printed: str, shown: str, name: str) -> None:
    assert NUMBER.sub("0", printed) == NUMBER.sub("0", shown), f"{name} prints:\n{printed}"
    for got, wanted in zip(NUMBER.findall(printed), NUMBER.findall(shown), strict=True):
        assert float(got) == pytest.approx(float(wanted), rel=0.01), f"{name} prints:\n{printed}"


def test_a_wrong_output_is_seen() -> None:
    compare("a 1.004 b\n", "a 1.0 b\n", "here")
    for shown in ("a 1.05 b\n", "a 1.0 c\n", ""):
        with pytest.raises(AssertionError):
            compare("a 1.004 b\n", shown, "here")


@pytest.mark.parametrize("block", of_language("json"))
def test_json_lines_parse(block: Block) -> None:
    for line in block.text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("block", of_language("sh"))
def test_commands_exist(block: Block) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        assert list(unknown(line)) == [], f"{block.name}: {line}"


def test_a_wrong_command_is_seen() -> None:
    for line, wrong in {
        "make nothing": "make nothing",
        "python -m benchmarks.nothing": "module benchmarks.nothing",
        "python -m benchmarks.frames_sweep --fames 3": "option --fames of benchmarks",
        "python -m ral train --preset nothing": "preset nothing",
        "pip install '.[nothing]'": "extra nothing",
        "accelerate launch --config_file nothing.yaml -m ral train": "file nothing.yaml",
        "A=1 makes test": "program makes",
    }.items():
        assert list(unknown(line)) == [wrong]


def unknown(line: str) -> Iterator[str]:
    """What a line of shell names that is not there."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words = words[1:]
    if not words:
        return
    program, *rest = words
    if program == "make":
        targets = make_targets()
        yield from (f"make {word}" for word in rest if "=" not in word and word not in targets)
    elif program == "python":
        if rest[0] != "-m":
            yield from (f"file {rest[0]}" for _ in [0] if not (ROOT / rest[0]).is_file())
    elif program not in PROGRAMS:
        yield f"program {program}"
    extras = re.search(r"\[(\w+)\]", line) if program == "pip" else None
    if extras and f"\n{extras.group(1)} = [" not in (ROOT / "pyproject.toml").read_text():
        yield f"extra {extras.group(1)}"
    if "--config_file" in rest and not (ROOT / (file := after(rest, "--config_file"))).is_file():
        yield f"file {file}"
    if "-m" in rest and program in ("python", "accelerate"):
        yield from _unknown_to_module(after(rest, "-m"), rest[rest.index("-m") + 2 :])


def _unknown_to_module(module: str, arguments: list[str]) -> Iterator[str]:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        yield f"module {module}"
        return
    package = module.partition(".")[0]
    if "--preset" in arguments:
        preset = after(arguments, "--preset")
        if not (ROOT / "ral" / "presets" / f"{preset}.yaml").is_file():
            yield f"preset {preset}"
    known = options_of(package)
    for word in arguments:
        if word.startswith("--") and word.partition("=")[0] not in known:
            yield f"option {word} of {package}"


@functools.cache
def options_of(package: str) -> set[str]:
    """Every option that a string in the package's source names."""
    found: set[str] = set()
    sources = [*(ROOT / package).rglob("*.py")]
    if package == "ral":  # whose attention-map is a command of ral_kernels
        sources.append(ROOT / "ral_kernels" / "cli.py")
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found |= set(re.findall(r"(?<![\w-])--[a-z][\w-]*", node.value))
    return found


def make_targets() -> set[str]:
    text = (ROOT / "Makefile").read_text()
    return set(re.findall(r"^([\w-]+):(?!=)", text, re.MULTILINE))


def after(words: list[str], option: str) -> str:
    return words[words.index(option) + 1]


def test_nothing_advises_an_index_that_does_not_have_the_package() -> None:
    advice = re.compile(r"\bral-kernels\[")
    files = {*cited_files.files()} - {Path(__file__)}
    assert ROOT / "ral_kernels" / "cli.py" in files
    guilty = [path for path in files if advice.search(path.read_text())]
    assert guilty == []


def test_a_missing_file_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether all of the tree exist, `make lint` says."""
    monkeypatch.setattr(cited_files, "ROOT", tmp_path)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "case.py").write_text("# The cases of tests/other.py and of case.py.\n")
    (tmp_path / "a.md").write_text("`tests/case.py`, `case.py`, [x](b.md), `tests/<op>.cpp`, 1/2\n")
    (tmp_path / "kernel.cu").write_text('// See "tests/case.py".\nint x;  // as kernel.h says\n')
    assert list(cited_files.missing(tmp_path / "tests" / "case.py")) == [(1, "tests/other.py")]
    assert list(cited_files.missing(tmp_path / "a.md")) == [(1, "b.md"), (1, "tests/<op>.cpp")]
    assert list(cited_files.missing(tmp_path / "kernel.cu")) == [(2, "kernel.h")]
