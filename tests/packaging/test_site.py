"""The site of the documents: what its pages say is so, every link leads somewhere, it is shown.

`make docs` installs what builds it, so the tests that need the site skip elsewhere. `RAL_REQUIRE`
with `chromium` in it makes that a failure, as it does for the browser.
"""

from __future__ import annotations

import ast
import functools
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import unquote

import pytest

from tests.browser import PHONE

from . import cited_files

ROOT = cited_files.ROOT
SOURCES = ("ral_kernels", "ral", "setup.py")
VARIABLE = re.compile(r"RAL_[A-Z0-9_]+")
QUOTE = re.compile(r"\| (`+)(.+?)\1 (?:for [^|]+)?\|")


def load_hook() -> ModuleType:
    spec = importlib.util.spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


hook = load_hook()


# -- what pages say -------------------------------------------------------------------------------


def strings(path: Path) -> Iterator[str]:
    """The texts of a Python file, with `…` for what varies."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…" for part in node.values
            )


def python_files(*roots: str) -> Iterator[Path]:
    for root in roots:
        path = ROOT / root
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


@functools.cache
def messages() -> list[str]:
    return [text for path in python_files(*SOURCES) for text in strings(path)]


def is_in_sources(quote: str) -> bool:
    """Whether one text has the parts of a quote in their order."""
    parts = [part for part in quote.split("…") if part.strip()]
    return any(_in_order(parts, text) for text in messages())


def _in_order(parts: list[str], text: str) -> bool:
    at = 0
    for part in parts:
        at = text.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return True


@pytest.mark.parametrize("document, least", [("troubleshooting.md", 50), ("backends.md", 10)])
def test_quoted_messages_are_in_the_sources(document: str, least: int) -> None:
    lines = (ROOT / "docs" / document).read_text().splitlines()
    found = [match.group(2) for line in lines if (match := QUOTE.match(line))]
    quoted = [text for text in found if " " in text]
    assert len(quoted) >= least
    assert [text for text in quoted if not is_in_sources(text)] == []


def test_a_wrong_quote_is_seen() -> None:
    assert is_in_sources("…: backend … is not available: …")
    assert not is_in_sources("…: backend … is not there: …")


def read_variables(path: Path) -> set[str]:
    """Environment variables that a file of the tree names as such."""
    source = path.read_text()
    if "RAL_" not in source:
        return set()
    if path.suffix == ".py":
        tree = ast.parse(source)
        nodes = list(ast.walk(tree))
        texts = {node.value for node in nodes if isinstance(node, ast.Constant)}
        calls = (node for node in nodes if isinstance(node, ast.Call))
        kept = {  # names in CMake's cache, which setup.py reads
            argument.value for call in calls for argument in call.args
            if ast.unparse(call.func) == "cached" and isinstance(argument, ast.Constant)
        }  # fmt: skip
        return {x for x in texts - kept if isinstance(x, str) and VARIABLE.fullmatch(x)}
    return set(re.findall(r"(?<![\w-])(?<!-D)(RAL_[A-Z0-9_]+)=", source))


def test_every_environment_variable_is_in_the_table() -> None:
    text = (ROOT / "docs" / "environment.md").read_text()
    listed = set(re.findall(r"^\| ((?:`\w+`,? ?)+)\|", text, re.MULTILINE))
    listed = {name for cell in listed for name in VARIABLE.findall(cell)}
    files = [*python_files("ral_kernels", "ral", "benchmarks", "tests", "setup.py")]
    files += [ROOT / "Makefile", ROOT / ".ci" / "run"]
    found = {name for path in files for name in read_variables(path)}
    assert listed == found


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().split()) <= 700


# -- links ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page, written, shown",
    [
        ("index.md", "[a](docs/install.md#x)", "[a](install.md#x)"),
        ("training.md", "[a](../docs/figure3.md)", "[a](figure3.md)"),
        ("equations/policy.md", "[a](divergence.md)", "[a](policy_divergence.md)"),
        ("equations/ops.md", "[a](attention/README.md)", "[a](attention.md)"),
        ("install.md", "[a](environment.md) [b](#x)", "[a](environment.md) [b](#x)"),
        ("install.md", "[a](https://b.c/d.md)", "[a](https://b.c/d.md)"),
        ("install.md", "![a](../benchmarks/x/y.png)", "![a](pictures/y.png)"),
        ("index.md", "[a](ral/launch)", "[a](HERE/tree/main/ral/launch)"),
        ("index.md", "[a](setup.py)", "[a](HERE/blob/main/setup.py)"),
        ("index.md", "[a\nb](ral/README.md)", "[a\nb](training.md)"),
        ("index.md", "```sh\n[a](setup.py)\n```", "```sh\n[a](setup.py)\n```"),
    ],
)
def test_links_of_the_tree_become_links_of_the_site(page: str, written: str, shown: str) -> None:
    assert hook.rewrite(written, page, "HERE") == shown


def test_without_a_repository_the_text_of_a_link_stands_alone() -> None:
    assert hook.rewrite("see [`setup.py`](setup.py).", "index.md", None) == "see `setup.py`."


def test_every_document_is_a_page() -> None:
    """Or generated, or a subject of one folder."""
    named = {path.relative_to(ROOT).as_posix() for path in cited_files.files()}
    documents = {n for n in named if n.endswith(".md") and not n.startswith(("docs/", "."))}
    assert documents - set(hook.INCLUDED) <= {"SECURITY.md", "examples/README.md"}
    nav = (ROOT / "mkdocs.yml").read_text()
    pages = {*hook.INCLUDED.values(), *(path.name for path in (ROOT / "docs").glob("*.md"))}
    assert {page for page in pages if f": {page}\n" not in nav} == set()


def test_the_table_of_settings_has_each_with_its_default() -> None:
    config = ast.parse((ROOT / "ral" / "config.py").read_text())
    named = [x.target.id for x in ast.walk(config)
             if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]  # fmt: skip
    rows = hook.settings().splitlines()[2:]
    assert [row.split("`")[1] for row in rows] == named and len(named) > 20
    assert next(row for row in rows if "`attn_coef`" in row).startswith("| `attn_coef` | `1.0` | λ")


# -- the site -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built as `make docs` does."""
    from tests.conftest import skip_or_fail

    if importlib.util.find_spec("mkdocs") is None:
        skip_or_fail("chromium", "the packages of the site are missing (make docs installs them)")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """The site on a server of this machine."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *given: Any, **options: Any) -> None:
            super().__init__(*given, directory=str(site), **options)

        def log_message(self, *given: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# What a page shows, and where it leads: links to other pages, each with its anchor.
LOOK = """() => ({
    ids: [...document.querySelectorAll('[id]')].map(x => x.id),
    links: [...document.querySelectorAll('a[href]')].map(a => a.href),
    broken: [...document.images].filter(x => x.complete && !x.naturalWidth).map(x => x.src),
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
})"""


@pytest.mark.slow(stands_in="test_links_of_the_tree_become_links_of_the_site")
@pytest.mark.xdist_group("chromium")
def test_every_page_in_a_browser(site: Path, address: str, browser_page: Any) -> None:
    """No error, no request elsewhere (the fixture), no broken link, anchor or picture.

    Nothing is wider than a phone: wide tables scroll within the page.
    """
    browser_page.set_viewport_size(PHONE)
    pages = sorted(path.relative_to(site).as_posix() for path in site.rglob("*.html"))
    assert len(pages) > 25
    ids, links, wrong = {}, {}, []
    for page in pages:
        browser_page.goto(f"{address}/{page}", wait_until="networkidle")
        browser_page.evaluate("for (const x of document.images) x.loading = 'eager'")
        browser_page.wait_for_function("[...document.images].every(x => x.complete)")
        seen = browser_page.evaluate(LOOK)
        ids[page], links[page] = set(seen["ids"]), seen["links"]
        wrong += [f"{page}: the picture {source} is broken" for source in seen["broken"]]
        if seen["wide"] > 0:
            wrong.append(f"{page}: is {seen['wide']} pixels wider than a phone")
    for page, found in links.items():
        for link in found:
            target, _, anchor = link.partition("#")
            if not target.startswith(address):
                continue
            path = target.removeprefix(address).strip("/") or "index.html"
            if not (site / path).is_file():
                wrong.append(f"{page}: {link} leads nowhere")
            elif anchor and path in ids and unquote(anchor) not in ids[path]:
                wrong.append(f"{page}: {link} has no such anchor")
    assert wrong == []


@pytest.mark.slow(stands_in="test_links_of_the_tree_become_links_of_the_site")
@pytest.mark.xdist_group("chromium")
def test_the_search_finds_an_op(address: str, browser_page: Any) -> None:
    from playwright.sync_api import TimeoutError

    query, found = (
        browser_page.locator(x) for x in ("input[name=query]", ".md-search-result__item")
    )
    browser_page.goto(f"{address}/index.html")
    query.press_sequentially("span_bias")
    for _ in range(30):  # until the page's script listens: it reads the field after each key
        query.press("End")
        try:
            found.nth(3).wait_for(timeout=10_000)
        except TimeoutError:
            continue
        return
    pytest.fail("the search has found less than four sections")
