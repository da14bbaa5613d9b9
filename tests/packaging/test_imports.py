"""Who may import whom: rooms of `ral_kernels` form no cycle, and `ral` uses public names alone."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import import_arrows

ROOT = import_arrows.ROOT
PACKAGE = ROOT / "ral_kernels"
# What a user of the package may import, and hence `ral`: the names in `__all__` of each.
ENTRY_POINTS = ("ral_kernels", "ral_kernels.integrations.transformers", "ral_kernels.viz")
# The package itself, which imports all rooms, and its users: the command line and what it prints.
MAY_IMPORT_THE_FRONT_DOOR = ("ral_kernels.cli", "ral_kernels.info", "ral_kernels.__main__")


@pytest.mark.parametrize("package", [PACKAGE, ROOT / "ral"], ids=lambda path: path.name)
def test_rooms_form_no_cycle(package: Path) -> None:
    """An op and its folder of Triton kernels count as one room."""
    cycles = [
        group
        for group in import_arrows.cycles(package)
        if len({name.removesuffix(".triton") for name in group}) > 1
    ]
    assert cycles == []


def test_nothing_imports_the_front_door_from_inside() -> None:
    guilty = {source for source, target in import_arrows.imports(PACKAGE) if target == PACKAGE.name}
    assert sorted(guilty - set(MAY_IMPORT_THE_FRONT_DOOR)) == []


def test_the_kernels_import_nothing_of_the_trainer() -> None:
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, _ in _imported(ast.parse(path.read_text())):
            assert name.partition(".")[0] not in ("ral", "benchmarks", "tests"), path


@pytest.mark.parametrize("path", sorted((ROOT / "ral").rglob("*.py")), ids=lambda path: path.stem)
def test_the_trainer_uses_public_names(path: Path) -> None:
    assert list(private_uses(path.read_text())) == []


def test_private_uses_are_found() -> None:
    assert list(private_uses("from ral_kernels.runtime import checks")) == ["ral_kernels.runtime"]
    assert list(private_uses("import ral_kernels as rk\nrk.ral_loss\nrk.runtime")) == ["rk.runtime"]
    assert list(private_uses("from ral_kernels import ops")) == ["ral_kernels.ops"]
    assert list(private_uses("from ral_kernels.viz import overlay")) == []


def private_uses(source: str) -> Iterator[str]:
    """What a module takes of `ral_kernels` that is not public."""
    tree = ast.parse(source)
    names: dict[str, str] = {}  # in the source -> of the entry point
    for module, alias in _imported(tree):
        if module.partition(".")[0] != "ral_kernels":
            continue
        if module not in ENTRY_POINTS:
            yield module
        elif isinstance(alias, tuple):
            names[alias[1]] = module
        elif alias not in public(module):
            yield f"{module}.{alias}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = names.get(node.value.id, "")
            if module and node.attr not in public(module):
                yield f"{node.value.id}.{node.attr}"


def public(module: str) -> set[str]:
    names: list[str] = importlib.import_module(module).__all__
    return {*names, "__version__"}


def _imported(tree: ast.AST) -> Iterator[tuple[str, str | tuple[str, str]]]:
    """(module, name taken from it), or (module, ("as", its name here)) of a module as a whole."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, ("as", alias.asname or alias.name.partition(".")[0])
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield node.module, alias.name


ENGINES = {"deepspeed", "hydra", "verl", "vllm"}  # in environments of their own


def test_what_the_tests_import_is_declared() -> None:
    """`make test` installs the extra `dev`: another extra must not lend it a package."""
    installed = _installed_by("ral-kernels", "dev")
    providers = metadata.packages_distributions()
    missing = set()
    for package in ("ral_kernels", "ral", "benchmarks", "examples", "tests"):
        for path in (ROOT / package).rglob("*.py"):
            for name, _ in _imported(ast.parse(path.read_text())):
                top = name.partition(".")[0]
                if top in sys.stdlib_module_names | ENGINES or (ROOT / top).exists():
                    continue
                if not installed & {canonicalize_name(d) for d in providers.get(top, ())}:
                    missing.add(f"{path.relative_to(ROOT)}: {name}")
    assert missing == set()


def _installed_by(name: str, extra: str) -> set[str]:
    """The distributions that installing `name[extra]` here brings, itself among them."""
    found: set[str] = set()
    asked = [(name, extra)]
    seen = set(asked)
    while asked:
        name, extra = asked.pop()
        found.add(canonicalize_name(name))
        for line in metadata.requires(name) or ():
            needed = Requirement(line)
            if needed.marker and not needed.marker.evaluate({"extra": extra}):
                continue
            new = {(needed.name, each) for each in {"", *needed.extras}} - seen
            seen |= new
            asked += new
    return found


WITHOUT_TRANSFORMERS = """
import sys
sys.modules["transformers"] = None  # importing it raises
import ral_kernels as rk
names = ["attention_map", "capture", "spans_for", "steer"]
assert set(names) <= set(dir(rk))
for name in names:
    try:
        getattr(rk, name)(None, None, None, None)
    except Exception as error:
        print(name, type(error).__name__, error)
"""


def test_names_that_need_transformers_say_so() -> None:
    """`spans_for` works without it, on what processors return."""
    command = [sys.executable, "-c", WITHOUT_TRANSFORMERS]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    advice = "transformers >= 4.57 must be installed (pip install 'transformers>=4.57'); it is not"
    said = dict(line.split(" ", 1) for line in printed.splitlines())
    assert "TypeError" in said.pop("spans_for")
    assert said == {x: f"ImportError {x}: {advice}" for x in ("attention_map", "capture", "steer")}


TWICE = """
import importlib.util, sys, torch

def load(name, folder):
    spec = importlib.util.spec_from_file_location(name, folder + "/__init__.py")
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

import ral_kernels
(folder, name), = [sys.argv[1:]]
copies = [ral_kernels, load(name, folder), load("ral-kernels", "ral_kernels")]
q = torch.randn(1, 2, 8, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
found = []
for rk in copies:
    compiled = torch.compile(rk.attention, backend="aot_eager", fullgraph=True)
    out = [attend(q, q, q, rk.Spans.from_lengths([3, 5])) for attend in (rk.attention, compiled)]
    gradients = [torch.autograd.grad(x.marginals[..., 0].sum(), q)[0] for x in out]
    found.append([out[0].marginals, out[1].marginals, *gradients])
for tensors in found:
    for x, wanted in zip(tensors, found[0]):
        assert torch.equal(x, wanted)
spaces = ["ral", name, "ral_kernels"]
ops = [getattr(torch.ops, space).attention_fwd.default for space in spaces]
assert len(set(ops)) == 3
from transformers.modeling_utils import AttentionInterface
attend = AttentionInterface()["ral"]
assert attend.__module__.startswith("ral_kernels."), attend.__module__
"""


@pytest.mark.slow(stands_in="test_imports_inside_the_package_are_relative")
@pytest.mark.skipif(sys.version_info < (3, 11), reason="hub.layout needs Python 3.11")
def test_copies_of_the_package_live_in_one_process(tmp_path: Path) -> None:
    """As the Hub's `kernels` loads them: from a path, under the name that the metadata says."""
    from hub import layout

    folder, other = layout.lay_out(tmp_path / "hub")
    metadata = json.loads((folder / "metadata.json").read_text())
    assert re.fullmatch(r"_ral_kernels_cpu_[0-9a-f]{7}", metadata["id"])
    assert other.name == "torch-cuda"
    for name, digest in metadata["digest"]["files"].items():
        found = hashlib.sha256((folder / name).read_bytes()).digest()
        assert base64.b64decode(digest) == found
    result = subprocess.run(
        [sys.executable, "-c", TWICE, str(folder), metadata["id"]],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr


def test_imports_inside_the_package_are_relative() -> None:
    """An absolute one would take the names of another copy."""
    for path in sorted(PACKAGE.rglob("*.py")):
        modules = {name for name, _ in _imported(ast.parse(path.read_text()))}
        assert not any(x.partition(".")[0] == PACKAGE.name for x in modules), path
