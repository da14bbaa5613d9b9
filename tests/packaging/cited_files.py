"""Files that comments and documents cite and that do not exist: `make cited-files`.

    python -m tests.packaging.cited_files            # of the whole tree; status 1 if one is missing
    python -m tests.packaging.cited_files FILE...    # of these files

It reads Markdown, comments and docstrings of Python, and comments of C++ and CUDA. A citation is a
word that ends like a source file (`README.md`, `csrc/cpu/core/simd.h`), that begins with a folder
of the tree (`tests/ops`), or that a link of Markdown points to. `<op>` and `*` stand for any name,
and `{cpu,cuda}` for each of its parts. A citation may be in the folder of the citing file and those
above it, in the folders that C++ includes are relative to, in those that the file includes from,
and in folders that it has cited before: `csrc/cpu/core/simd.h`, then `amx.h`.
"""

from __future__ import annotations

import ast
import io
import itertools
import re
import subprocess
import sys
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = (".py", ".h", ".cu", ".cpp", ".md")
FOLDERS = ("benchmarks", "csrc", "docs", "examples", "hub", "ral", "ral_kernels", "tests", ".ci")
INCLUDED_FROM = ("csrc/cpu", "csrc/cuda", "csrc/include")
# Written by builds and runs, so that a fresh clone lacks them.
GENERATED = re.compile(r"^(build|dist|ral_kernels/lib|benchmarks/results/local)(/|$)|\.(so|whl)$")
# Of other projects and of the system.
EXTERNAL = {"cuda.h", "immintrin.h", "malloc.h", "mma.h", "modeling_utils.py", "asm/prctl.h"}
WORD = re.compile(r"(?<![\w./{}<>*-])\.{0,2}[\w./{}<>*,-]*[\w}>*/]")
LINK = re.compile(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)")
URL = re.compile(r"\w+://\S+|\b\w+\.(?:org|com|io)/\S+")
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
COMMENT = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/\*.*?\*/', re.DOTALL)

Found = Iterator[tuple[int, str]]  # line, citation


def texts(path: Path) -> Found:
    """(line, text) of what may cite in a file."""
    source = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        fence: str | None = None  # the language of the block that a line is in
        for line, text in enumerate(source.splitlines(), 1):
            if text.lstrip().startswith("```"):
                fence = None if fence is not None else text.strip("` ")
            elif fence != "text":  # what something printed
                yield line, text
    elif path.suffix == ".py":
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT:
                yield token.start[0], token.string[1:]
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body:
                docstring = ast.get_docstring(node, clean=False) or ""
                yield from enumerate(docstring.splitlines(), node.body[0].lineno)
    else:
        for match in COMMENT.finditer(source):
            if not match.group().startswith('"'):
                start = source.count("\n", 0, match.start()) + 1
                for number, comment in enumerate(match.group().splitlines(), start):
                    yield number, comment.lstrip("/* ")


def citations(path: Path) -> Found:
    """(line, citation), each as it is written."""
    for line, text in sorted(texts(path)):
        text = URL.sub(" ", text)
        if path.suffix == ".md":
            yield from ((line, link) for link in LINK.findall(text))
            text = LINK.sub("]", text)
        for word in WORD.findall(text):
            word = word.strip(",")
            if looks_like_a_file(word) or re.search(r"\w/$", word):
                yield line, word


def looks_like_a_file(word: str) -> bool:
    first, slash, _ = word.partition("/")
    if word.endswith(SUFFIXES):
        return word not in SUFFIXES and not word.startswith("*.")
    return bool(slash) and first in FOLDERS


def resolve(citation: str, folders: Iterable[Path]) -> list[Path] | None:
    """A file for each of the citation's patterns; None if one of them has none."""
    found = []
    for pattern in _patterns(citation):
        if GENERATED.search(pattern) is None:
            matches = (next(folder.glob(pattern.rstrip("/")), None) for folder in folders)
            match = next((each for each in matches if each is not None), None)
            if match is None:
                return None
            found.append(match)
    return found


def _patterns(citation: str) -> Iterator[str]:
    """The citation as patterns of `glob`: placeholders as `*`, braces one by one."""
    parts = re.split(r"\{([^}]*)\}", re.sub(r"<[^>]*>", "*", citation))
    choices = [part.split(",") if index % 2 else [part] for index, part in enumerate(parts)]
    for chosen in itertools.product(*choices):
        yield re.sub(r"^\./", "", "".join(chosen))


def missing(path: Path) -> Found:
    """(line, citation) of each that is nowhere `path` may mean."""
    folders = [ROOT / folder for folder in path.relative_to(ROOT).parents]
    folders += [ROOT / folder for folder in INCLUDED_FROM]
    if path.suffix in (".h", ".cu", ".cpp"):
        for name in INCLUDE.findall(path.read_text(encoding="utf-8")):
            folders += [match.parent for match in resolve(name, folders) or ()]
    for line, citation in citations(path):
        if citation in EXTERNAL:
            continue
        found = resolve(citation, folders)
        if found is None:
            if looks_like_a_file(citation):
                yield line, citation
        elif "/" in citation:
            folders += [match if match.is_dir() else match.parent for match in found]


def files() -> list[Path]:
    """What git tracks, results of benchmarks aside; where there is no git, what lies here."""
    try:
        command = ["git", "-C", str(ROOT), "ls-files"]
        names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        names = [
            str(found.relative_to(ROOT))
            for folder in FOLDERS
            for found in sorted((ROOT / folder).rglob("*"))
        ]
        names += [found.name for found in ROOT.glob("*.md")]
    return [
        ROOT / name
        for name in names
        if name.endswith(SUFFIXES) and "results" not in name.split("/") and (ROOT / name).is_file()
    ]


def main() -> int:
    chosen = [Path(name).resolve() for name in sys.argv[1:]] or files()
    count = 0
    for path in chosen:
        for line, citation in sorted(set(missing(path))):
            print(f"{path.relative_to(ROOT)}:{line}: cites {citation}, which does not exist")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main())
