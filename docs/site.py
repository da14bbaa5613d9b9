"""The hook of mkdocs.yml: documents that live beside their code become pages, and links follow.

`make docs` builds the site with it. A link is written for the repository: relative, to a file of
the tree. On the site it leads to the page made of that file, to a copy of the picture, or to the
source in the repository that pyproject.toml names. Without such a name its text stands alone.
"""

from __future__ import annotations

import ast
import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# Where a document of the tree stands on the site.
INCLUDED = {
    "README.md": "index.md",
    "ral_kernels/integrations/README.md": "transformers.md",
    "ral/README.md": "training.md",
    "benchmarks/README.md": "benchmarks.md",
    "benchmarks/gpu/README.md": "gpu.md",
    "ral_kernels/ops/README.md": "equations/ops.md",
    "ral_kernels/ops/attention/README.md": "equations/attention.md",
    "ral_kernels/ops/policy/README.md": "equations/policy.md",
    "ral_kernels/ops/policy/divergence.md": "equations/policy_divergence.md",
    "ral_kernels/ops/divergence/README.md": "equations/divergence.md",
    "csrc/README.md": "native.md",
    "tests/README.md": "tests.md",
    "tests/cuda_host/README.md": "cuda_host.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
}
SETTINGS = "<!-- the settings of RALConfig -->"
PICTURES = (".png", ".svg")
LINK = re.compile(r"(!?)\[((?:[^\[\]]|!\[[^\]]*\]\([^)]*\))*)\]\(([^)#\s]*)(#[^)\s]*)?\)")
FENCED = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)


def source_of(page: str) -> str:
    """The file of the tree that a page is made of."""
    return next((s for s, made in INCLUDED.items() if made == page), f"docs/{page}")


def place_of(path: str) -> str | None:
    """Where a file of the tree stands on the site; None if it does not."""
    if path in INCLUDED:
        return INCLUDED[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    if path.endswith(PICTURES):
        return f"pictures/{path.rpartition('/')[2]}"
    return None


def rewrite(markdown: str, page: str, repository: str | None) -> str:
    """A page's Markdown with links for the site."""
    folder = os.path.dirname(source_of(page))

    def one(match: re.Match[str]) -> str:
        mark, text, target, anchor = match.groups()
        text, anchor = LINK.sub(one, text), anchor or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return f"{mark}[{text}]({target}{anchor})"
        path = os.path.normpath(os.path.join(folder, target))
        place = place_of(path)
        if place is not None:
            return f"{mark}[{text}]({os.path.relpath(place, os.path.dirname(page) or '.')}{anchor})"
        if repository is None:
            return text
        kind = "tree" if (ROOT / path).is_dir() else "blob"
        return f"[{text}]({repository}/{kind}/main/{path}{anchor})"

    parts = FENCED.split(markdown)  # every second one is a fenced block
    return "".join(part if i % 2 else LINK.sub(one, part) for i, part in enumerate(parts))


def pictures() -> dict[str, str]:
    """Pictures outside docs/ that pages show: file of the tree -> place on the site."""
    sources = [*INCLUDED, *(f"docs/{found.name}" for found in (ROOT / "docs").glob("*.md"))]
    found = {}
    for source in sources:
        for _, text, target, _ in LINK.findall((ROOT / source).read_text(encoding="utf-8")):
            inner = [link[2] for link in LINK.findall(text)]
            for name in (target, *inner):
                path = os.path.normpath(os.path.join(os.path.dirname(source), name))
                if name.endswith(PICTURES) and not path.startswith("docs/"):
                    found[path] = str(place_of(path))
    if len(set(found.values())) < len(found):
        raise ValueError(f"docs/site.py: pictures must have different names; got {sorted(found)}")
    return found


def settings() -> str:
    """A table of what `RALConfig` adds to TRL's settings, from its source."""
    tree = ast.parse((ROOT / "ral" / "config.py").read_text(encoding="utf-8"))
    config = next(x for x in tree.body if isinstance(x, ast.ClassDef) and x.name == "RALConfig")
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for field in config.body:
        if isinstance(field, ast.AnnAssign) and isinstance(field.value, ast.Call):
            name, call = ast.unparse(field.target), field.value
            options = {option.arg: option.value for option in call.keywords}
            if call.args:  # _setting(default, help)
                default, text = call.args
            else:  # field(default_factory=lambda: default, or list; metadata={"help": help})
                factory, metadata = options["default_factory"], options["metadata"]
                assert isinstance(metadata, ast.Dict)
                default = factory.body if isinstance(factory, ast.Lambda) else ast.List([])
                text = metadata.values[0]
            what = str(ast.literal_eval(text)).replace("|", "\\|")
            rows.append(f"| `{name}` | `{ast.unparse(default)}` | {what} |")
    return "\n".join(rows)


def repository() -> str | None:
    """What pyproject.toml says where the sources are."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^Homepage *= *"([^"]+)"', text, re.MULTILINE)
    return None if found is None else found.group(1).rstrip("/")


def on_files(files: Any, config: Any) -> Any:
    """Called by mkdocs: add the documents and pictures from outside docs/."""
    from mkdocs.structure.files import File

    for source, place in {**INCLUDED, **pictures()}.items():
        files.append(File.generated(config, place, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Called by mkdocs for each page."""
    if page.file.src_uri == "index.md":  # a section of one page needs no list beside it
        page.meta["hide"] = ["navigation"]
    markdown = markdown.replace(SETTINGS, settings())
    return rewrite(markdown, page.file.src_uri, repository())
