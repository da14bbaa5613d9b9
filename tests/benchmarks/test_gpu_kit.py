"""What is carried to a GPU machine is found there: the cache of kernels, and the key to it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from benchmarks.gpu import kit
from ral_kernels.runtime import triton_runtime
from tests.conftest import skip_or_fail


def entry(cache: Path, key: str, kernel: str) -> Path:
    folder = cache / key
    folder.mkdir(parents=True)
    for suffix, content in (("json", "{}"), ("cubin", "machine code"), ("ttir", "large")):
        (folder / f"{kernel}.{suffix}").write_text(content)
    (folder / f"__grp__{kernel}.json").write_text('{"child_paths": {"x": "/elsewhere"}}')
    return folder


def test_a_cache_is_found_where_it_is_unpacked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By Triton itself, whose groups hold absolute paths."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    from triton.runtime.cache import get_cache_manager

    made = tmp_path / "made"
    key = "00" * 32
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "state" / "cache"))
    name = Path(get_cache_manager(key).cache_dir).name
    entry(made, name, "toy_kernel")
    (made / "launcher").mkdir()
    (made / "launcher" / "__triton_launcher.so").write_text("machine code")
    carried = tmp_path / "kit"
    carried.mkdir()
    assert kit.pack(made, carried / kit.CACHE) == 1
    (carried / kit.DESCRIPTION).write_text(json.dumps({"versions": {"triton": "3.6.0"}}))
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    found = kit.unpack(carried, tmp_path / "state")
    assert found["kernels"] == 1
    assert [problem.split(":")[0] for problem in found["problems"]] == [kit.PTXAS, kit.LIBRARY]
    group = get_cache_manager(key).get_group("toy_kernel.json")
    assert group is not None and set(group) == {"toy_kernel.json", "toy_kernel.cubin"}
    assert all(Path(path).is_file() for path in group.values())
    launcher = tmp_path / "state" / "cache" / "launcher" / "__triton_launcher.so"
    assert os.access(launcher, os.X_OK)


def test_a_damaged_kit_is_said_and_does_not_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / kit.CACHE).write_bytes(b"no archive")
    (tmp_path / kit.PTXAS).write_bytes(b"no ptxas")
    (tmp_path / kit.DESCRIPTION).write_text("{")
    monkeypatch.setattr(kit, "ROOT", tmp_path)
    found = kit.unpack(tmp_path, tmp_path / "state")
    assert len(found["problems"]) == 4 and found["kernels"] == 0


@pytest.mark.parametrize("version", ["here", "another"])
def test_the_key_is_pinned_for_one_release(
    version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    import triton
    from triton.runtime import cache

    wanted = triton.__version__ if version == "here" else "0.0.1"
    (tmp_path / kit.DESCRIPTION).write_text(json.dumps({"versions": {"triton": wanted}}))
    monkeypatch.setenv(kit.VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "triton_key", cache.triton_key)
    before = cache.triton_key
    kit.use()
    assert (cache.triton_key is not before) == (version == "here")
