"""The forward of `attention` for Hopper in the harness, where copies and products are badly timed.

It weighs the same blocks of keys in the same order as the plain kernel for sm_80, which
test_attention.py compares with the reference. Here, where products are summed alike, both must give
the same bits. Head dims between its columns must give those of inputs with zeros after them.
The last section runs it on a Hopper GPU where there is one; `make gpu` does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ral_kernels as rk
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import HARNESS, sources_of
from tests.cuda_host.test_attention import HALF, TILES, WIDE, WIDTHS, has_kernel, packed
from tests.gpu.on_gpu import kernels_on
from tests.ops import test_attention as common
from tests.ops.attention_cases import CASES, AttentionCase, AttentionInputs

SOURCES = (*sources_of("attention/fwd*"), str(HARNESS / "hopper_for_tests.cu"))
FWD, FWD_SM90 = "ral_cuda_attention_fwd", "ral_cuda_attention_fwd_sm90"

# Of 300 keys. Blocks of 64 keys with a span each are added in their own way, and only if it is new.
TOKENS = {
    "a_span_each_token": torch.arange(300),
    "each_token_twice": torch.arange(300) % 128,
    "tokens_between_halves_of_a_frame": torch.cat(
        [torch.zeros(70), torch.arange(1, 161), torch.zeros(70)]
    ).int(),
    "the_last_token_goes_on": torch.arange(300).clamp(max=127),
    "tokens_descend": torch.arange(300).flip(0),
    "every_other_token": torch.where(torch.arange(300) % 2 == 0, torch.arange(300), -1),
}


class TokensCase(AttentionCase):
    def _spans(self, generator: torch.Generator, device: torch.device | str) -> rk.Spans:
        return rk.Spans(TOKENS[self.name].to(device), 300)


# A consumer has 64 queries, a block of threads 128 or 192. Buffers are used anew after 256 keys, of
# 256 columns after 128.
CONSUMERS = [
    AttentionCase("ring_64", 200, 700, spans="ragged", options={"is_causal": True}),
    AttentionCase("ring_128", 130, 600, head_dim=128, spans="equal", key_padding="left"),
    AttentionCase("last_consumer_has_one_query", 129, 90, head_dim=128, spans="equal"),
    AttentionCase("rows_across_consumers", 200, 70, spans="ragged", options={"rows": (60, 70)}),
    AttentionCase("spans_of_16", 70, 320, head_dim=128, spans="equal", num_spans=20),
    *(TokensCase(name, 70, 300, head_dim=64 + 64 * (n % 2)) for n, name in enumerate(TOKENS)),
    AttentionCase("ring_256", 130, 330, 1, 2, 1, 256, spans="ragged", options={"is_causal": True}),
    TokensCase("a_span_each_token", 70, 300, 1, 1, 1, 256),
    AttentionCase(
        "dims_80_window",
        140,
        270,
        1,
        2,
        1,
        80,
        spans="equal",
        layout="strided",
        key_padding="left",
        options={"window": (70, 3)},
    ),
    AttentionCase("dims_192_128", 70, 200, 1, 2, 1, 192, 128, spans="equal", layout="mixed"),
]


@pytest.fixture(scope="session")
def hopper(build_folder: Path) -> Kernels:
    return host_library(build_folder, (), SOURCES)


def plain_entry(entry: str, columns: int) -> str:
    """Of the plain kernels for sm_80; those of 256 columns are in hopper*_for_tests.cu."""
    return f"{entry}_plain_256" if columns == 256 else entry


def columns_of(case: AttentionCase) -> int:
    """Columns of the kernels for Hopper that run it."""
    widest = max(case.head_dim, case.head_dim_v or 0)
    return next(columns for columns in (64, 128, 256) if widest <= columns)


def widened(inputs: AttentionInputs, columns: int) -> AttentionInputs:
    """The same call with zeros after the head dims, up to `columns`."""
    if inputs.q.shape[-1] == inputs.v.shape[-1] == columns:
        return inputs

    def wide(x: Tensor) -> Tensor:
        return F.pad(x.detach(), (0, columns - x.shape[-1])).requires_grad_(x.requires_grad)

    options = {"scale": inputs.q.shape[-1] ** -0.5, **inputs.options}
    return AttentionInputs(wide(inputs.q), wide(inputs.k), wide(inputs.v), inputs.spans, options)


def call(
    library: Kernels, entry: str, order: int, inputs: AttentionInputs
) -> rk.AttentionOutput[Tensor | None]:
    """The forward by the kernel of `entry`."""
    kernel = getattr(library.functions, entry)
    with mock.patch.object(library.functions, FWD, kernel, create=True):
        library.set_order(order)
        try:
            return rk.attention(
                inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
            )
        finally:
            library.set_order(0)


def plain_outputs(
    library: Kernels, inputs: AttentionInputs, columns: int
) -> rk.AttentionOutput[Tensor | None]:
    """By the plain kernel for sm_80, of inputs with zeros after them; `out` has them too."""
    return call(library, plain_entry(FWD, columns), 0, widened(inputs, columns))


def outputs(
    library: Kernels, order: int | None, case: AttentionCase, dtype: torch.dtype
) -> rk.AttentionOutput[Tensor | None]:
    """By the kernel for Hopper in some order, or with None by the plain one."""
    inputs = case.inputs(dtype)
    if order is not None:
        return call(library, FWD_SM90, order, inputs)
    found = plain_outputs(library, inputs, columns_of(case))
    return found._replace(out=found.out[..., : inputs.v.shape[-1]])


def assert_same_bits(ours: tuple[Tensor | None, ...], wanted: tuple[Tensor | None, ...]) -> None:
    for x, y in zip(ours, wanted, strict=True):
        assert (x is None) == (y is None)
        assert x is None or y is None or torch.equal(x, y)


def assert_agrees(library: Kernels, case: AttentionCase, dtype: torch.dtype, orders: range) -> None:
    wanted = outputs(library, None, case, dtype)
    assert not wanted.out.isnan().any()
    for order in orders:
        assert_same_bits(outputs(library, order, case, dtype), wanted)


def is_taken(case: AttentionCase) -> bool:
    """Whether it has no options that the kernels for Hopper leave to others."""
    return (
        has_kernel(case)
        and case.span_bias == "none"
        and case.attn_mask == "none"
        and "softcap" not in case.options
    )


EVERY_CASE = list(filter(is_taken, (*CASES, *TILES, *WIDTHS, *WIDE, *CONSUMERS)))


@pytest.mark.parametrize("case", EVERY_CASE, ids=lambda case: case.name)
def test_same_bits_as_for_sm_80(case: AttentionCase, hopper: Kernels) -> None:
    dtype = HALF[len(case.name) % 2]
    with on_host(hopper):
        assert_agrees(hopper, case, dtype, range(1, 2))


@pytest.mark.parametrize("dtype", HALF, ids=("bfloat16", "float16"))
@pytest.mark.parametrize("case", [*CONSUMERS[:2], CONSUMERS[-4]], ids=lambda case: case.name)
def test_any_order_gives_the_same_bits(
    case: AttentionCase, dtype: torch.dtype, hopper: Kernels
) -> None:
    with on_host(hopper):
        assert_agrees(hopper, case, dtype, range(2, 5))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences_do_not_see_each_other(head_dim: int, hopper: Kernels) -> None:
    """NaN in one sequence stays there, although its rows are copied with its neighbours'."""
    lengths = [65, 131, 1, 9, 70], [65, 131, 20, 9, 300]
    q, k, v, cu_q, cu_k = packed(0, *lengths, head_dim)
    q, k, v = (x.detach() for x in (q, k, v))
    for x, cuts in ((q, cu_q), (k, cu_k), (v, cu_k)):
        x[cuts[1] : cuts[2]] = float("nan")
    spans = rk.Spans(torch.arange(len(k)) * 6 // len(k), 6)
    results = []
    for entry, order in ((plain_entry(FWD, head_dim), 0), (FWD_SM90, 1)):
        with (
            on_host(hopper),
            mock.patch.object(hopper.functions, FWD, getattr(hopper.functions, entry)),
        ):
            hopper.set_order(order)
            results.append(
                rk.flash_attn_varlen_func(
                    q, k, v, cu_q, cu_k, max(lengths[0]), max(lengths[1]), causal=True, spans=spans
                )
            )
            assert hopper.calls == {"fwd": 1}
    hopper.set_order(0)
    for ours, wanted in zip(*results, strict=True):
        rows = wanted.shape.index(len(q)) if len(q) in wanted.shape else 0
        keep = torch.ones(len(q), dtype=torch.bool)
        keep[cu_q[1] : cu_q[2]] = False
        ours, wanted = (x.movedim(rows, 0)[keep] for x in (ours, wanted))
        assert not wanted.isnan().any() and torch.equal(ours, wanted)


@pytest.mark.parametrize(("side", "head_dim"), [("left", 64), ("right", 64), ("left", 256)])
def test_values_behind_padding_are_not_read(side: str, head_dim: int, hopper: Kernels) -> None:
    case = AttentionCase(
        "padded", 70, 400, batch_size=2, head_dim=head_dim, key_padding=side, spans="equal"
    )
    inputs = case.inputs(torch.bfloat16)
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]
    assert hidden.any()
    for x in (inputs.k, inputs.v):
        x.masked_fill_(hidden.expand_as(x), float("nan"))
    with (
        on_host(hopper),
        mock.patch.object(hopper.functions, FWD, getattr(hopper.functions, FWD_SM90)),
    ):
        hopper.set_order(1)
        result = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
        )
        hopper.set_order(0)
    assert not any(x.isnan().any() for x in result if x is not None)


def test_what_a_map_cannot_say_is_left_to_the_other_kernel(hopper: Kernels) -> None:
    """Keys of one head, seen as two: a stride of 0."""
    inputs = AttentionCase("shared", 9, 20, num_heads=4, num_kv_heads=1).inputs(torch.bfloat16)
    k, v = (x.expand(-1, 2, -1, -1) for x in (inputs.k, inputs.v))
    statuses = []

    def watched(*given):
        statuses.append(getattr(hopper.functions, FWD_SM90)(*given))
        return statuses[-1]

    with on_host(hopper), mock.patch.object(hopper.functions, FWD, watched):
        rk.attention(inputs.q, k, v, backend="cuda")
    assert statuses == [-2]
    assert hopper.functions.ral_cuda_failed_kernel() == b"a stride of 0"


# ---- On a GPU ------------------------------------------------------------------------------------

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
ON_GPU = [(case, dtype) for case in EVERY_CASE for dtype in HALF] if HOPPER else []
HEAD_DIMS_ON_GPU = [64, 80, 128, 256] if HOPPER else []
DEVICE = torch.device("cuda", 0)


@contextlib.contextmanager
def without_hopper() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAL_CUDA_HOPPER", "0")
        yield


def assert_close(ours: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for x, y in zip(ours, wanted, strict=True):
        assert not y.isnan().any()
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-3)


@pytest.mark.parametrize(
    ("case", "dtype"), ON_GPU, ids=lambda x: getattr(x, "name", str(x).removeprefix("torch."))
)
def test_outputs_and_gradients_on_gpu(
    case: AttentionCase, dtype: torch.dtype, hopper_gpu: None
) -> None:
    """Against float64, forward and backward by the kernels for Hopper."""
    with kernels_on(DEVICE, "cuda"):
        common.check_case(case, dtype, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS_ON_GPU)
def test_long_sequences_repeat_bit_for_bit_on_gpu(head_dim: int, hopper_gpu: None) -> None:
    """More blocks than a GPU holds, and every buffer filled many times."""
    case = AttentionCase(
        "long", 3000, 5000, 2, 8, 2, head_dim, spans="ragged", num_spans=40,
        options={"is_causal": True},
    )  # fmt: skip
    inputs = case.inputs(torch.bfloat16)
    q, k, v = (x.to(DEVICE) for x in (inputs.q, inputs.k, inputs.v))
    assert inputs.spans is not None
    spans = rk.Spans(inputs.spans.ids.to(DEVICE), inputs.spans.num_spans)

    def call() -> tuple[Tensor, ...]:
        return tuple(rk.attention(q, k, v, spans, is_causal=True, backend="cuda"))

    with without_hopper():
        wanted = call()
    first = call()
    assert_close(first, wanted)
    for _ in range(50):
        assert_same_bits(call(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS_ON_GPU)
def test_rows_that_are_not_seen_on_gpu(head_dim: int, hopper_gpu: None) -> None:
    """NaN in padded keys and values, and in another of the packed sequences."""
    case = AttentionCase("padded", 200, 700, 2, head_dim=head_dim, key_padding="left")
    inputs = case.inputs(torch.bfloat16)
    padding = inputs.options["key_padding_mask"].to(DEVICE)
    q, k, v = (x.to(DEVICE) for x in (inputs.q, inputs.k, inputs.v))
    for x in (k, v):
        x.masked_fill_(~padding[:, None, :, None], float("nan"))

    def padded() -> tuple[Tensor, ...]:
        result = rk.attention(q, k, v, key_padding_mask=padding, backend="cuda")
        return result.out, result.lse

    lengths = [65, 131, 1, 9, 300], [65, 131, 20, 9, 900]
    tensors = packed(0, *lengths, head_dim)
    packed_q, packed_k, packed_v, cu_q, cu_k = (x.detach().to(DEVICE) for x in tensors)
    packed_k[cu_k[1] : cu_k[2]] = float("nan")
    packed_v[cu_k[1] : cu_k[2]] = float("nan")
    keep = torch.ones(len(packed_q), dtype=torch.bool, device=DEVICE)
    keep[cu_q[1] : cu_q[2]] = False

    def together() -> tuple[Tensor, ...]:
        out = rk.flash_attn_varlen_func(
            packed_q, packed_k, packed_v, cu_q, cu_k, max(lengths[0]), max(lengths[1]), causal=True
        )
        assert isinstance(out, Tensor)
        return (out[keep],)

    for call in (padded, together):
        with without_hopper():
            wanted = call()
        assert_close(call(), wanted)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS_ON_GPU)
def test_graph_on_gpu(head_dim: int, hopper_gpu: None) -> None:
    """Tensor maps are parameters of the launch: a replay finds the tensors where they were."""
    draw = torch.Generator(DEVICE).manual_seed(0)
    q, k, v = (
        torch.randn(2, h, 300, head_dim, generator=draw, device=DEVICE).half() for h in (4, 2, 2)
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        rk.attention(q, k, v, backend="cuda")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = rk.attention(q, k, v, backend="cuda")
    for x in (q, k, v):
        x.normal_(generator=draw)
    graph.replay()
    torch.cuda.synchronize()
    assert_same_bits(captured, rk.attention(q, k, v, backend="cuda"))
