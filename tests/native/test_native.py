"""Loading the compiled libraries: what is said when one is missing, and whose OpenMP they use."""

import ctypes
import hashlib
import mmap
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ral_kernels as rk
from ral_kernels.runtime import cpu_library, native

linux_only = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the loader's names and scopes are Linux's"
)


@pytest.fixture
def library_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "LIBRARY_DIR", tmp_path)
    native.load.cache_clear()
    yield tmp_path
    native.load.cache_clear()


def test_missing_library_says_how_to_build_it(library_dir):
    message = (
        "libral_cpu.so is not built; to build it, install a C++17 compiler (g++ or clang++) and "
        "run, where the sources are, `pip install --no-cache-dir --force-reinstall --no-deps .`, "
        "or in a checkout `python setup.py build_ext --inplace`"
    )
    assert native.why_missing("ral_cpu") == message
    with pytest.raises(RuntimeError, match=re.escape(message)):
        native.load("ral_cpu")


def test_missing_library_says_what_stopped_the_build(library_dir):
    (library_dir / "ral_cpu.missing.txt").write_text("no working C++17 compiler\n")
    reason = native.why_missing("ral_cpu")
    assert reason is not None
    assert reason.startswith(
        "libral_cpu.so is not built (at installation: no working C++17 compiler); to build it"
    )


def test_library_that_the_loader_refuses(library_dir):
    (library_dir / "libral_cpu.so").write_bytes(b"not a library")
    reason = native.why_missing("ral_cpu")
    assert reason is not None
    assert reason.startswith("libral_cpu.so does not load: ")
    assert "libral_cpu.so: " in reason.removeprefix("libral_cpu.so does not load: ")  # the loader's


needs_library = pytest.mark.skipif(
    native.why_missing("ral_cpu") is not None, reason="ral_cpu is not built"
)
BUILT = native.LIBRARY_DIR / "libral_cpu.so"


def write_checksum(library: Path) -> None:
    digest = hashlib.sha256(library.read_bytes()).hexdigest()
    library.with_name(f"{library.name}.sha256").write_text(f"{digest}  {library.name}\n")


@needs_library
def test_the_build_leaves_a_checksum():
    content = BUILT.with_name("libral_cpu.so.sha256").read_text().split()
    assert content == [hashlib.sha256(BUILT.read_bytes()).hexdigest(), "libral_cpu.so"]


@linux_only
@needs_library
@pytest.mark.parametrize("with_checksum", [True, False])
def test_a_truncated_library_is_not_loaded(library_dir, with_checksum):
    """The loader would map it, and the process would die of SIGBUS."""
    library, content = library_dir / "libral_cpu.so", BUILT.read_bytes()
    if with_checksum:
        library.write_bytes(content)
        write_checksum(library)
    for size in (len(content) // 2, 4096, len(content) - 1, 100, 50, 0):
        library.write_bytes(content[:size])
        reason = native.why_missing("ral_cpu")
        assert reason is not None
        if size == 0 and not with_checksum:
            assert reason.startswith("libral_cpu.so does not load: ")  # by the loader, safely
        else:
            assert reason.startswith("libral_cpu.so is damaged: it"), reason
            assert "python setup.py build_ext --inplace" in reason
        assert f"it has {size} of {len(content)} bytes" in reason or size <= 100
    library.write_bytes(content)
    assert native.why_missing("ral_cpu") is None


@needs_library
def test_a_flipped_byte_is_found(library_dir):
    library, content = library_dir / "libral_cpu.so", bytearray(BUILT.read_bytes())
    library.write_bytes(content)
    write_checksum(library)
    content[len(content) // 2] ^= 1
    library.write_bytes(content)
    reason = native.why_missing("ral_cpu")
    assert reason is not None
    assert re.match(r"libral_cpu.so is damaged: its SHA-256 is [0-9a-f]{64}, not that of", reason)


@linux_only
def test_another_library_under_its_name(library_dir):
    (library_dir / "libral_cpu.so").symlink_to(some_library())
    wanted = "libral_cpu.so has no symbol ral_cpu_attention_struct_sizes: it is another library"
    with pytest.raises(RuntimeError, match=re.escape(wanted)):
        native.load("ral_cpu")


@linux_only
@needs_library
def test_a_symbol_that_is_missing_later(library_dir, monkeypatch):
    """As in a library of older sources."""
    shutil.copy(BUILT, library_dir)
    library = native.load("ral_cpu")
    with pytest.raises(RuntimeError, match=r"^libral_cpu.so has no symbol ral_cpu_of_tomorrow: "):
        getattr(library, "ral_cpu_of_tomorrow")  # noqa: B009
    assert not hasattr(library, "ral_cpu_of_tomorrow")


def some_library() -> Path:
    """A shared library that loads wherever torch does."""
    return Path(torch.__file__).parent / "lib" / "libc10.so"


@linux_only
@needs_library
def test_load_is_cached_and_a_failure_is_not(library_dir):
    assert native.why_missing("ral_cpu") is not None
    (library_dir / "libral_cpu.so").symlink_to(BUILT)  # built meanwhile
    assert native.why_missing("ral_cpu") is None
    library = native.load("ral_cpu")
    assert isinstance(library, ctypes.CDLL)
    assert native.load("ral_cpu") is library


def openmp_libraries() -> set[str]:
    """The OpenMP runtimes that are mapped into this process."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[-1] for line in lines if re.search(r"/lib(g|i)?omp[^/]*$", line)}


class DlInfo(ctypes.Structure):
    _fields_ = [
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("symbol", ctypes.c_char_p),
        ("address", ctypes.c_void_p),
    ]


def library_at(address: int) -> ctypes.CDLL:
    info = DlInfo()
    assert ctypes.CDLL(None).dladdr(ctypes.c_void_p(address), ctypes.byref(info)) != 0
    return ctypes.CDLL(info.file.decode())


@pytest.fixture
def openmp() -> int:
    address = native.openmp_runtime()
    if address is None:
        pytest.skip("this torch does not run on OpenMP")
    return address


@linux_only
def test_openmp_runtime_of_this_torch_is_found():
    if "ATen parallel backend: OpenMP" not in torch.__config__.parallel_info():
        pytest.skip("this torch does not run on OpenMP")
    assert native.openmp_runtime() is not None


@linux_only
def test_openmp_runtime_is_the_one_that_torch_sets_threads_in(openmp):
    before = torch.get_num_threads()
    try:
        for num_threads in (1, 3):
            torch.set_num_threads(num_threads)
            assert library_at(openmp).omp_get_max_threads() == num_threads
    finally:
        torch.set_num_threads(before)


@linux_only
def test_openmp_runtime_loads_nothing(openmp):
    before = openmp_libraries()
    native.openmp_runtime.cache_clear()
    assert native.openmp_runtime() == openmp
    assert openmp_libraries() == before


@linux_only
@pytest.mark.slow(stands_in="test_openmp_runtime_runs_a_team")
def test_openmp_runtime_is_torchs_beside_anothers(openmp):
    """scikit-learn brings a libgomp of its own; loaded first, it must not be taken for torch's."""
    code = (
        "import sklearn.utils._openmp_helpers as helpers, torch\n"
        "from tests.native.test_native import library_at, openmp_libraries\n"
        "from ral_kernels.runtime import native\n"
        "torch.set_num_threads(3)\n"
        "print(library_at(native.openmp_runtime()).omp_get_max_threads(), len(openmp_libraries()))"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    threads, runtimes = result.stdout.split()
    assert threads == "3"
    if runtimes == "1":
        pytest.skip("scikit-learn shares torch's OpenMP runtime here")


@linux_only
def test_openmp_runtime_runs_a_team(openmp):
    function_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel = ctypes.CFUNCTYPE(None, function_type, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)(
        openmp
    )
    thread_num = library_at(openmp).omp_get_thread_num
    seen = []
    parallel(function_type(lambda data: seen.append((thread_num(), data))), 42, 3, 0)
    assert sorted(seen) == [(0, 42), (1, 42), (2, 42)]


@linux_only
@needs_library
def test_variant_chosen_by_itself(monkeypatch):
    """The best that the processor runs, but for bfloat16 on AVX-512 where float32 is faster."""
    intel = "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    library = cpu_library.library()
    advisable = {}
    for name in cpu_library.supported_isas():
        monkeypatch.setenv("RAL_CPU_ISA", name)
        index = cpu_library.chosen_isa()
        assert library.ral_cpu_isa_name(ctypes.c_int32(index)) == name.encode()
        advisable[index] = bool(library.ral_cpu_isa_advisable(ctypes.c_int32(index)))
        assert advisable[index] == (not (intel and name == "avx512_bf16"))
    monkeypatch.delenv("RAL_CPU_ISA")
    assert cpu_library.chosen_isa() == min(index for index in advisable if advisable[index])


@needs_library
def test_amx_beside_torchs_own_use_of_it():
    """Neither leaves the tiles in a state that the other trips over."""
    if "amx_bf16" not in cpu_library.supported_isas():
        pytest.skip("this processor or its system has no AMX")
    x = torch.randn(256, 256).bfloat16()
    q = torch.randn(1, 4, 100, 64).bfloat16()
    before, product = rk.attention(q, q, q, backend="cpu").out, x @ x
    for _ in range(3):
        assert torch.equal(rk.attention(q, q, q, backend="cpu").out, before)
        assert torch.equal(x @ x, product)


def advised_ranges() -> list[tuple[int, int]]:
    """Addresses of this process for which huge pages were asked."""
    ranges = []
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if mapping := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = (int(address, 16) for address in mapping.groups())
        elif line.startswith("VmFlags:") and "hg" in line.split():
            ranges.append((begin, end))
    return ranges


def advised_bytes(begin: int, end: int) -> int:
    """How many bytes from `begin` to `end` huge pages were asked for."""
    return sum(max(0, min(end, stop) - max(begin, start)) for start, stop in advised_ranges())


needs_huge_pages = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages"
)


@needs_library
@needs_huge_pages
def test_advice_on_fresh_memory_stays_within_it():
    with mmap.mmap(-1, 32 << 20) as memory:
        whole = torch.frombuffer(memory, dtype=torch.uint8)
        begin, end = whole.data_ptr(), whole.data_ptr() + whole.numel()
        whole[:] = 7
        cpu_library.expect_writes(whole[100 : 3 << 20], None)  # too small
        assert advised_bytes(begin, end) == 0
        part = whole[(5 << 20) + 100 : (21 << 20) + 300]
        cpu_library.expect_writes(part)
        inside = advised_bytes(part.data_ptr(), part.data_ptr() + part.numel())
        assert inside >= 14 << 20  # all but the ends
        assert inside == advised_bytes(begin, end)
        assert bool((whole == 7).all())
        del whole, part


@needs_library
@needs_huge_pages
@pytest.mark.slow(stands_in="test_advice_on_fresh_memory_stays_within_it")
def test_outputs_are_announced():
    q, k, v = (torch.randn(1, 4, 4096, 128, requires_grad=True) for _ in range(3))  # 8 MiB each
    out = rk.attention(q, k, v, is_causal=True, backend="cpu").out
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    with torch.no_grad():
        p = rk.attention_policy(q[:, :, :512], k, is_causal=False, backend="cpu")  # 8 MiB
    for x in (out, *gradients, p):
        assert advised_bytes(x.data_ptr(), x.data_ptr() + x.nbytes) >= x.nbytes // 2
