"""What the Triton kernels share: availability, architectures, recorded launches, tuned tiles."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

import ral_kernels as rk
from ral_kernels.runtime import backends, triton_runtime
from ral_kernels.runtime.triton_runtime import Tile
from tests.conftest import skip_or_fail

if triton_runtime._installed():
    # Before a test takes TRITON_INTERPRET away: Triton's own functions are for the interpreter, or
    # for the compiler, from their import on.
    import triton

TILES = (Tile(64, 64, 4, 2), Tile(128, 64, 8, 3), Tile(128, 128, 8, 3, {"USE_TMA": True}))
CPU = torch.device("cpu")


def needs_triton() -> None:
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels are compiled: without TRITON_INTERPRET."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, compiled: None) -> Iterator[dict[str, Any]]:
    """A GPU that answers questions; the test changes the answers."""
    answers: dict[str, Any] = {"capability": (9, 0), "name": "NVIDIA H200"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *index: answers["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *index: answers["name"])
    triton_runtime._architecture.cache_clear()
    yield answers
    triton_runtime._architecture.cache_clear()


# -- availability ----------------------------------------------------------------------------------


def test_without_triton(monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any]) -> None:
    monkeypatch.setattr(triton_runtime, "_installed", lambda: False)
    assert triton_runtime.available() == "triton is not installed (pip install triton)"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.3.1", "Triton >= 3.4 is needed; found 3.3.1"),
        ("2.10.0", "Triton >= 3.4 is needed; found 2.10.0"),
        ("3.4.0", None),
        ("3.10.0+git1234", None),
        (None, None),
    ],
)
def test_old_triton(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], version: str | None, reason: str | None
) -> None:
    monkeypatch.setattr(triton_runtime, "_installed", lambda: True)
    monkeypatch.setattr(triton_runtime, "_version", lambda: version)
    assert triton_runtime.available() == reason


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch, compiled: None) -> None:
    needs_triton()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    reason = triton_runtime.available()
    assert reason is not None and "no CUDA device" in reason and "TRITON_INTERPRET=1" in reason


def test_old_gpu(gpu: dict[str, Any]) -> None:
    needs_triton()
    assert triton_runtime.available() is None
    gpu["capability"] = (7, 5)
    assert triton_runtime.available() == "it needs compute capability 8.0 or newer"


def test_devices_and_dtypes(monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any]) -> None:
    half = torch.zeros(2, dtype=torch.bfloat16)
    assert triton_runtime.cannot_run(half) == "needs CUDA tensors; got cpu"
    with triton_runtime.record_launches("sm_80"):
        assert triton_runtime.cannot_run(half, None, torch.zeros(2), torch.arange(3)) is None
        reason = triton_runtime.cannot_run(half, torch.zeros(2, dtype=torch.float64))
        assert reason == "it computes float32, bfloat16 and float16; got torch.float64"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.cannot_run(torch.zeros(2)) is None
    assert triton_runtime.cannot_run(half) == "Triton's interpreter multiplies bfloat16 wrongly"
    reason = triton_runtime.cannot_run(torch.zeros(2, device="meta"))
    assert reason == "with TRITON_INTERPRET=1 it needs CPU tensors; got meta"


def test_interpreter_is_never_chosen_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow as it is, it runs where a test asks for it and nowhere else."""
    needs_triton()
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.available() is None
    assert triton_runtime.only_on_request() == "the interpreter is for tests"
    tables = {name: table for name, table in backends._tables.items() if "triton" in table}
    assert tables.keys() == backends._tables.keys(), "an op without Triton kernels"
    for op, table in tables.items():
        for name, module in table.items():
            monkeypatch.setattr(module, "can_run", lambda args: None)
            if name != "triton":
                monkeypatch.setattr(module, "available", lambda: None)
        assert backends.choose(op, table, None, "") is not table["triton"]
        assert backends.choose(op, table, None, "triton") is table["triton"]


def test_kernels_on_a_gpu_are_chosen_unasked(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any]
) -> None:
    needs_triton()
    assert triton_runtime.only_on_request() is None
    for op, table in backends._tables.items():
        for name in {"cuda", "triton"} & table.keys():  # those of C++ could, and are skipped
            monkeypatch.setattr(table[name], "can_run", lambda args: None)
        assert backends.choose(op, table, None, "") is table["triton"]


def test_what_the_package_says(compiled: None) -> None:
    reason = triton_runtime.available()
    assert rk.available_backends()["triton"] == ("yes" if reason is None else reason)


# -- architectures ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("capability", "row"),
    [
        ((8, 0), "sm_80"),
        ((8, 6), "sm_80"),
        ((8, 9), "sm_80"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((10, 3), "sm_100"),
        ((11, 0), "sm_100"),
        ((12, 0), "sm_80"),
    ],
)
def test_architecture(gpu: dict[str, Any], capability: tuple[int, int], row: str) -> None:
    gpu["capability"] = capability
    assert triton_runtime.architecture(torch.device("cuda")) == row
    assert triton_runtime.architecture(torch.device("cuda", 0)) == row


def test_architecture_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_runtime.architecture(CPU) == triton_runtime.INTERPRETER
    assert triton_runtime.num_multiprocessors(CPU) == 132
    monkeypatch.delenv("TRITON_INTERPRET")
    for name in triton_runtime.ARCHITECTURES:
        with triton_runtime.record_launches(name):
            assert triton_runtime.architecture(CPU) == name
            assert triton_runtime.num_multiprocessors(CPU) == 132


# -- launches --------------------------------------------------------------------------------------


class Kernel:
    """Stands in for a JITFunction: keeps what it was launched with."""

    __name__ = "toy_fwd_kernel"

    def __init__(self) -> None:
        self.launched: list[tuple[tuple[int, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda **arguments: self.launched.append((grid, arguments))


def test_launch_states_fp_fusion() -> None:
    kernel = Kernel()
    triton_runtime.launch(kernel, (3, 1), {"n": 5}, num_warps=4, num_stages=2)
    triton_runtime.launch(kernel, (3,), {"n": 5}, num_warps=8, num_stages=1, fp_fusion=False)
    triton_runtime.launch(kernel, (3, 0), {"n": 5}, num_warps=8, num_stages=1)  # nothing to do
    assert kernel.launched == [
        ((3, 1), {"n": 5, "num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}),
        ((3,), {"n": 5, "num_warps": 8, "num_stages": 1, "enable_fp_fusion": False}),
    ]


def test_launches_on_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any]
) -> None:
    """Also where another device is the current one, which is all that Triton asks for."""
    current, seen = [0], []

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *error: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel = Kernel()
    with FakeTensorMode(allow_non_fake_inputs=True):
        tensors = [torch.empty(2, device=f"cuda:{index}") for index in (0, 1)]
    for x in tensors:
        monkeypatch.setattr(
            Kernel, "__getitem__", lambda self, grid: lambda **rest: seen.append(current[-1])
        )
        triton_runtime.launch(kernel, (3,), {"n": 5, "x_ptr": None, "y_ptr": x}, 4, 2)
        triton_runtime.launch(kernel, (3,), {"n": 5, "y": (None, 1, (x, 1))}, 4, 2)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAL_AUTOTUNE", "1")
            patch.setattr(triton_runtime, "_fastest", lambda *rest: seen.append(current[-1]))
            triton_runtime.tuned("toy", (), TILES[0], lambda: TILES, lambda tile: None, x.device)
    assert seen == [0, 0, 0, 1, 1, 1] and current == [0]


def test_record_launches(compiled: None) -> None:
    kernel = Kernel()
    with triton_runtime.record_launches("sm_90") as launches:
        assert triton_runtime.only_on_request() is None
        triton_runtime.launch(kernel, (2,), {"n": 5, "BLOCK": 64}, 4, 3)
        triton_runtime.launch(kernel, (0,), {"n": 5, "BLOCK": 64}, 4, 3)
        with triton_runtime.record_launches("sm_80") as inner:
            triton_runtime.launch(kernel, (4,), {}, 4, 3)
        assert triton_runtime.architecture(CPU) == "sm_90"
    assert not kernel.launched, "recorded, not run"
    (launch,), (within,) = launches, inner
    assert (launch.name, launch.grid) == ("toy_fwd_kernel", (2,)) and launch.kernel is kernel
    assert launch.arguments == {"n": 5, "BLOCK": 64}
    assert launch.options == {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    assert within.grid == (4,)
    triton_runtime.launch(kernel, (2,), {}, 4, 3)
    assert len(kernel.launched) == 1, "and run again afterwards"


def test_recording_ends_with_an_error(compiled: None) -> None:
    with pytest.raises(KeyError), triton_runtime.record_launches("sm_90"):
        raise KeyError
    assert triton_runtime._pretence is None


def test_nothing_is_recorded_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with (
        pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"),
        triton_runtime.record_launches("sm_90"),
    ):
        pass


# -- tuned tiles -----------------------------------------------------------------------------------


class Search:
    """`triton_runtime.tuned` with made-up times: by tile, inf for one that is out of resources."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
        self.times = {repr(tile): 3.0 - index for index, tile in enumerate(TILES)}
        self.timed: list[Tile] = []
        self.ran: list[Tile] = []
        monkeypatch.setenv("RAL_AUTOTUNE", "1")
        monkeypatch.setenv("RAL_CACHE_DIR", str(folder))
        monkeypatch.setattr(triton_runtime, "_milliseconds", self._milliseconds)
        self.forget()

    def _milliseconds(self, run: Any, tile: Tile) -> float:
        self.timed.append(tile)
        run(tile)
        return self.times[repr(tile)]

    def forget(self) -> None:
        """As a new process: what is on disk is all there is."""
        triton_runtime._tuning_cache.cache_clear()

    def tuned(self, key: tuple[Any, ...] = (128,), tiles: tuple[Tile, ...] = TILES) -> Tile:
        return triton_runtime.tuned("toy_fwd", key, TILES[0], lambda: tiles, self.ran.append, CPU)


@pytest.fixture
def search(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], tmp_path: Path
) -> Iterator[Search]:
    needs_triton()
    yield Search(monkeypatch, tmp_path / "cache")
    triton_runtime._tuning_cache.cache_clear()


def test_the_table_decides_unless_asked(search: Search, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "0", ""):
        if value is None:
            monkeypatch.delenv("RAL_AUTOTUNE")
        else:
            monkeypatch.setenv("RAL_AUTOTUNE", value)
        assert search.tuned() is TILES[0]
    monkeypatch.setenv("RAL_AUTOTUNE", "1")
    with triton_runtime.record_launches("sm_90"):
        assert search.tuned() is TILES[0]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert search.tuned() is TILES[0]
    assert not search.timed


def test_candidates_are_made_for_a_search_alone(compiled: None) -> None:
    """A launch does not pay for a list of tiles."""

    def candidates() -> tuple[Tile, ...]:
        raise AssertionError("a search without RAL_AUTOTUNE=1")

    found = triton_runtime.tuned("toy_fwd", (), TILES[0], candidates, lambda tile: None, CPU)
    assert found is TILES[0]


def test_searches_once_and_keeps_the_fastest(search: Search, tmp_path: Path) -> None:
    assert search.tuned() is TILES[2]
    assert search.timed == search.ran == list(TILES)
    assert search.tuned() is TILES[2]
    search.forget()
    assert search.tuned() is TILES[2]
    assert len(search.timed) == 3, "the next process reads the file"
    (file,) = (tmp_path / "cache").iterdir()
    assert "NVIDIA_H200" in file.name and "triton-" in file.name
    assert json.loads(file.read_text())


def test_other_questions_are_searched_anew(search: Search, gpu: dict[str, Any]) -> None:
    search.tuned()
    search.tuned(key=(64,))
    assert len(search.timed) == 6, "another head dim"
    assert search.tuned(tiles=TILES[:2]) is TILES[1]
    assert len(search.timed) == 8, "other candidates: an old index would name another tile"
    gpu["name"] = "NVIDIA B200"
    search.forget()
    search.tuned()
    assert len(search.timed) == 11, "another GPU"


def test_a_tile_out_of_resources_is_passed_over(search: Search) -> None:
    search.times[repr(TILES[2])] = float("inf")
    assert search.tuned() is TILES[1]
    search.times = dict.fromkeys(search.times, float("inf"))
    with pytest.raises(RuntimeError, match=r"toy_fwd: none of 3 tile sizes runs for \(64,\)"):
        search.tuned(key=(64,))


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "\0", '"text"', "null"])
def test_a_broken_cache_file_costs_a_search(search: Search, tmp_path: Path, content: str) -> None:
    search.tuned()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(content)
    search.forget()
    assert search.tuned() is TILES[2]
    assert len(search.timed) == 6
    assert json.loads(file.read_text())


@pytest.mark.parametrize("entry", [7, -9, "1", None, 1.0])
def test_a_broken_entry_costs_a_search(search: Search, tmp_path: Path, entry: Any) -> None:
    search.tuned()
    (file,) = (tmp_path / "cache").iterdir()
    file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), entry)))
    search.forget()
    assert search.tuned() is TILES[2]


def test_an_unwritable_cache_is_reported(
    search: Search,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("RAL_CACHE_DIR", str(tmp_path / "file" / "below"))
    search.forget()
    with caplog.at_level(logging.WARNING):
        assert search.tuned() is TILES[2]
    assert "cannot write" in caplog.text
    assert search.tuned() is TILES[2]
    assert len(search.timed) == 3, "kept in the process"


def test_timing_survives_a_tile_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    needs_triton()
    tile = TILES[0]
    monkeypatch.setattr(triton.testing, "do_bench", lambda run, **options: run() or 1.5)
    assert triton_runtime._milliseconds(lambda tile: None, tile) == 1.5

    def out_of_shared_memory(tile: Tile) -> None:
        raise triton.runtime.errors.OutOfResources(300_000, 232_448, "shared memory")

    def broken(tile: Tile) -> None:
        raise ZeroDivisionError

    assert triton_runtime._milliseconds(out_of_shared_memory, tile) == float("inf")
    with pytest.raises(ZeroDivisionError):  # a mistake of ours is no slow tile
        triton_runtime._milliseconds(broken, tile)


def test_importing_the_package_does_not_import_triton() -> None:
    """Triton may be missing, and takes a second where it is not."""
    code = (
        "import sys, torch; before = 'triton' in sys.modules; import ral_kernels; "
        "sys.exit('triton' in sys.modules and not before)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
