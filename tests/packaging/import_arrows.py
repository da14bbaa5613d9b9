"""Which rooms of a package import which: `python -m tests.packaging.import_arrows [PACKAGE]`.

A room is a folder below the package with all that is in it, or a module that lies loose at the top.
Below `ops` each op is a room. An arrow is an import from one room into another, at import time or
later. Imports for types alone do not count, except in an `__init__.py`, where they name what it
imports on first use. A cycle is a group of rooms that need each other.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def modules(package: Path) -> dict[str, Path]:
    """Dotted name -> file, of every module of the package."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(package: Path) -> list[tuple[str, str]]:
    """(module, module that it imports) inside the package, each pair once."""
    known = modules(package)
    found: set[tuple[str, str]] = set()
    for name, path in known.items():
        is_package = path.name == "__init__.py"
        for node in _statements(ast.parse(path.read_text(encoding="utf-8")), types=is_package):
            found |= {(name, target) for target in _targets(node, name, is_package, known)}
    return sorted((source, target) for source, target in found if source != target)


def _statements(tree: ast.AST, types: bool) -> Iterator[ast.stmt]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test) and not types:
            for other in node.orelse:
                yield from _statements(other, types)
        else:
            yield from _statements(node, types)


def _targets(node: ast.stmt, name: str, is_package: bool, known: dict[str, Path]) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names if alias.name in known)
    elif isinstance(node, ast.ImportFrom):
        base = "." * node.level + (node.module or "")
        within = name if is_package else name.rpartition(".")[0]
        module = importlib.util.resolve_name(base, within) if node.level else base
        for alias in node.names:
            if f"{module}.{alias.name}" in known:
                yield f"{module}.{alias.name}"
            elif module in known:
                yield module


def room(module: str) -> str:
    """The wing that a module is in."""
    parts = module.split(".")
    return ".".join(parts[: 3 if parts[1:2] == ["ops"] else 2])


def arrows(package: Path) -> list[tuple[str, str]]:
    """(room, room that it imports), each pair once."""
    pairs = {(room(source), room(target)) for source, target in imports(package)}
    return sorted((source, target) for source, target in pairs if source != target)


def cycles(package: Path) -> list[list[str]]:
    """Rooms that need each other, one list for each such group."""
    edges: dict[str, set[str]] = {}
    for source, target in arrows(package):
        edges.setdefault(source, set()).add(target)

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        todo = list(edges[start])
        while todo:
            if (name := todo.pop()) not in seen:
                seen.add(name)
                todo += edges.get(name, ())
        return seen

    reached = {name: reach(name) for name in edges}
    groups: list[list[str]] = []
    for name in edges:
        if name in reached[name] and not any(name in group for group in groups):
            groups.append(
                [name, *(x for x in reached[name] if name in reached.get(x, ()) and x != name)]
            )
    return [sorted(group) for group in groups]


def main() -> int:
    package = ROOT / (sys.argv[1] if len(sys.argv) > 1 else "ral_kernels")
    found = arrows(package)
    for source, target in found:
        print(f"{source} -> {target}")
    loops = cycles(package)
    for group in loops:
        print("cycle:", ", ".join(group))
    print(f"{len(found)} arrows between rooms, {len(loops)} cycles")
    return 0


if __name__ == "__main__":
    sys.exit(main())
