"""The backward of `attention` for Hopper in the harness, where copies and products are badly timed.

It sums over the same blocks in the same order as the kernels for sm_80, which test_attention.py
compares with the reference. Here, where products are summed alike, both must give the same bits.
The last section runs it on a Hopper GPU where there is one, as test_hopper.py does all cases.
"""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import HARNESS, sources_of
from tests.cuda_host.test_attention import HALF, packed
from tests.cuda_host.test_hopper import (
    DEVICE,
    EVERY_CASE,
    HEAD_DIMS_ON_GPU,
    assert_close,
    assert_same_bits,
    without_hopper,
)
from tests.ops import test_attention as common
from tests.ops.attention_cases import CASES, AttentionCase

HOPPER_SOURCES = (*sources_of("attention/bwd*"), str(HARNESS / "hopper_bwd_for_tests.cu"))
SOURCES = ("attention/fwd.cu", "attention/fwd_general.cu", *HOPPER_SOURCES)
BWD, BWD_SM90 = "ral_cuda_attention_bwd", "ral_cuda_attention_bwd_sm90"

# A consumer has 64 keys (dk, dv) or queries (dq), a block of threads 128 or 192 of them; buffers
# are used anew after 192 rows of the other side.
CONSUMERS = [
    AttentionCase("heads_share_a_ring", 200, 140, num_heads=6, num_kv_heads=2, spans="ragged"),
    AttentionCase("consumers_differ", 430, 430, spans="equal", options={"window": (9, 0)}),
    AttentionCase("last_consumer_has_one_key", 90, 129, head_dim=128, spans="equal"),
    AttentionCase("last_consumer_has_no_key", 90, 190, spans="equal", key_padding="right"),
    AttentionCase("keys_that_no_query_sees", 40, 300, options={"window": (5, 0)}),
]


@pytest.fixture(scope="session")
def hopper(build_folder: Path) -> Kernels:
    return host_library(build_folder, (), SOURCES)


Found = dict[str, Tensor]


class Backward:
    """A backward that the kernels for sm_80 have done, and those for Hopper can do again.

    Args:
        given: which of out, marginals and lse have a gradient.
    """

    def __init__(
        self,
        library: Kernels,
        case: AttentionCase,
        dtype: torch.dtype,
        given: tuple[bool, bool, bool] = (True, True, True),
    ) -> None:
        self._library = library
        self._inputs = inputs = case.inputs(dtype).requires_grad_()
        with on_host(library):
            self._outputs = rk.attention(
                inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
            )
            self._douts = [
                x if wanted else None
                for x, wanted in zip(common.output_gradients(self._outputs), given, strict=True)
            ]
            self.wanted: Found = self._gradients()

    def _gradients(self) -> Found:
        return common.gradients(self._outputs, self._inputs, self._douts, retain_graph=True)

    def on_hopper(self, order: int) -> Found:
        functions = self._library.functions
        kernel = getattr(functions, BWD_SM90)
        with on_host(self._library), mock.patch.object(functions, BWD, kernel):
            self._library.set_order(order)
            try:
                return self._gradients()
            finally:
                self._library.set_order(0)


def both(
    library: Kernels,
    case: AttentionCase,
    dtype: torch.dtype,
    orders: range,
    given: tuple[bool, bool, bool] = (True, True, True),
) -> tuple[Found, list[Found]]:
    """Gradients by the kernels for sm_80, and by those for Hopper in some orders."""
    backward = Backward(library, case, dtype, given)
    return backward.wanted, [backward.on_hopper(order) for order in orders]


def assert_agree(wanted: Found, found: list[Found]) -> None:
    for gradients in found:
        for name, gradient in gradients.items():
            assert not wanted[name].isnan().any()
            assert torch.equal(gradient, wanted[name]), f"d{name} has other bits"


# The forward of the op's own cases is in the quick tier, and of the backward those of its tiles.
slow = pytest.mark.slow(stands_in="test_same_bits_as_for_sm_80")


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=case.name, marks=slow if case in CASES else ())
        for case in (*EVERY_CASE, *CONSUMERS)
    ],
)
def test_same_bits_as_for_sm_80(case: AttentionCase, hopper: Kernels) -> None:
    assert_agree(*both(hopper, case, HALF[len(case.name) % 2], range(1, 2)))


@pytest.mark.parametrize("case", CONSUMERS[:3], ids=lambda case: case.name)
def test_any_order_gives_the_same_bits(case: AttentionCase, hopper: Kernels) -> None:
    assert_agree(*both(hopper, case, HALF[1 - len(case.name) % 2], range(2, 4)))


@pytest.mark.parametrize("head_dim", [64, 128])
def test_without_a_gradient_of_out(head_dim: int, hopper: Kernels) -> None:
    """Boxes of zeros stand for dout: dv is exactly 0."""
    case = AttentionCase("marginals", 70, 150, head_dim=head_dim, spans="ragged")
    wanted, found = both(hopper, case, torch.bfloat16, range(1, 3), (False, True, True))
    assert_agree(wanted, found)
    assert not found[0]["v"].any() and found[0]["q"].any() and found[0]["k"].any()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_packed_sequences_do_not_see_each_other(head_dim: int, hopper: Kernels) -> None:
    """NaN in one sequence stays there, although its rows are copied with its neighbours'."""
    lengths = [65, 131, 1, 9, 200], [65, 131, 20, 9, 210]
    q, k, v, cu_q, cu_k = packed(0, *lengths, head_dim)
    tensors = [x.detach() for x in (q, k, v)]
    for x, cuts in zip(tensors, (cu_q, cu_k, cu_k), strict=True):
        x[cuts[1] : cuts[2]] = float("nan")
        x.requires_grad_()
    spans = rk.Spans(torch.arange(len(k)) * 6 // len(k), 6)
    results = []
    with on_host(hopper):
        outputs = rk.flash_attn_varlen_func(
            tensors[0],
            tensors[1],
            tensors[2],
            cu_q,
            cu_k,
            max(lengths[0]),
            max(lengths[1]),
            causal=True,
            spans=spans,
        )
        douts = [common.random_like(x, seed) for seed, x in enumerate(outputs)]
        douts[0][cu_q[1] : cu_q[2]] = float("nan")
        for entry, order in ((BWD, 0), (BWD_SM90, 1)):
            kernel = getattr(hopper.functions, entry)
            with mock.patch.object(hopper.functions, BWD, kernel):
                hopper.set_order(order)
                results.append(torch.autograd.grad(outputs, tensors, douts, retain_graph=True))
        hopper.set_order(0)
        assert hopper.calls == {"fwd": 1, "bwd": 2}
    for wanted, ours, cuts in zip(*results, (cu_q, cu_k, cu_k), strict=True):
        keep = torch.ones(len(ours), dtype=torch.bool)
        keep[cuts[1] : cuts[2]] = False
        assert not wanted[keep].isnan().any() and torch.equal(ours[keep], wanted[keep])


PADDED = AttentionCase("padded", 130, 300, batch_size=2, key_padding="left", spans="equal")


def hide_nan(inputs) -> None:
    """NaN in padded keys and values."""
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]
    assert hidden.any()
    with torch.no_grad():
        for x in (inputs.k, inputs.v):
            x.masked_fill_(hidden.expand_as(x), float("nan"))


def padded_gradients(library: Kernels, dtype: torch.dtype) -> Found:
    inputs = PADDED.inputs(dtype)
    hide_nan(inputs)
    inputs.requires_grad_()
    with on_host(library):
        outputs = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
        )
        with mock.patch.object(library.functions, BWD, getattr(library.functions, BWD_SM90)):
            library.set_order(1)
            try:
                return common.gradients(outputs, inputs, common.output_gradients(outputs))
            finally:
                library.set_order(0)


def test_rows_behind_padding_are_not_read(hopper: Kernels) -> None:
    for name, gradient in padded_gradients(hopper, torch.bfloat16).items():
        assert not gradient.isnan().any(), name


def test_what_a_map_cannot_say_is_left_to_the_other_kernels(hopper: Kernels) -> None:
    """Keys of one head, seen as two: a stride of 0."""
    inputs = AttentionCase("shared", 9, 20, num_heads=4, num_kv_heads=1).inputs(torch.bfloat16)
    q = inputs.q.requires_grad_()
    k, v = (x.expand(-1, 2, -1, -1) for x in (inputs.k, inputs.v))
    statuses = []

    def watched(*given):
        statuses.append(getattr(hopper.functions, BWD_SM90)(*given))
        return statuses[-1]

    with on_host(hopper):
        out = rk.attention(q, k, v, backend="cuda").out
        with mock.patch.object(hopper.functions, BWD, watched):
            out.float().sum().backward()
    assert statuses == [-2]
    assert hopper.functions.ral_cuda_failed_kernel() == b"a stride of 0"


@pytest.mark.parametrize(
    "case",
    [
        AttentionCase("columns", 9, 20, head_dim=80),
        AttentionCase("head_dim_v", 9, 20, head_dim=64, head_dim_v=128),
        AttentionCase("span_bias", 9, 20, spans="equal", span_bias="full"),
        AttentionCase("attn_mask", 9, 20, attn_mask="bool"),
        AttentionCase("softcap", 9, 20, options={"softcap": 2.0}),
    ],
    ids=lambda case: case.name,
)
def test_other_calls_are_left_to_the_other_kernels(case: AttentionCase, hopper: Kernels) -> None:
    inputs = case.inputs(torch.bfloat16)
    statuses = []

    def watched(*given):
        statuses.append(getattr(hopper.functions, BWD_SM90)(*given))
        return statuses[-1]

    with on_host(hopper):
        out = rk.attention(
            inputs.q.requires_grad_(), inputs.k, inputs.v, inputs.spans, backend="cuda",
            **inputs.options,
        ).out  # fmt: skip
        with mock.patch.object(hopper.functions, BWD, watched):
            out.float().sum().backward()
    assert statuses == [-2]
    reason = hopper.functions.ral_cuda_failed_kernel()
    assert reason == b"options, or head dims other than 64 and 128"


# ---- On a GPU ------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS_ON_GPU)
def test_long_gradients_repeat_bit_for_bit_on_gpu(head_dim: int, hopper_gpu: None) -> None:
    """More blocks than a GPU holds, and every buffer filled many times."""
    case = AttentionCase(
        "long", 3000, 5000, 2, 8, 2, head_dim, spans="ragged", num_spans=40,
        options={"is_causal": True},
    )  # fmt: skip
    inputs = case.inputs(torch.bfloat16)
    tensors = [x.to(DEVICE).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    assert inputs.spans is not None
    spans = rk.Spans(inputs.spans.ids.to(DEVICE), inputs.spans.num_spans)
    result = rk.attention(*tensors, spans, is_causal=True, backend="cuda")
    outputs = [x for x in result if x is not None]
    douts = [common.random_like(x.cpu(), seed).to(DEVICE) for seed, x in enumerate(outputs)]

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, tensors, douts, retain_graph=True)

    with without_hopper():
        wanted = call()
    first = call()
    assert_close(first, wanted)
    for _ in range(50):
        assert_same_bits(call(), first)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", HEAD_DIMS_ON_GPU)
def test_gradients_of_rows_that_are_not_seen_on_gpu(head_dim: int, hopper_gpu: None) -> None:
    """NaN in padded keys and values, and in another of the packed sequences."""
    case = AttentionCase("padded", 200, 700, 2, head_dim=head_dim, key_padding="left")
    inputs = case.inputs(torch.bfloat16)
    hide_nan(inputs)
    padding = inputs.options["key_padding_mask"].to(DEVICE)
    tensors = [x.to(DEVICE).requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = rk.attention(*tensors, key_padding_mask=padding, backend="cuda").out
    for gradient in torch.autograd.grad(out, tensors, torch.ones_like(out)):
        assert not gradient.isnan().any()

    lengths = [65, 131, 1, 9, 300], [65, 131, 20, 9, 900]
    *unseen, cu_q, cu_k = (x.detach().to(DEVICE) for x in packed(0, *lengths, head_dim))
    for x, cuts in zip(unseen, (cu_q, cu_k, cu_k), strict=True):
        x[cuts[1] : cuts[2]] = float("nan")
        x.requires_grad_()
    packed_out = rk.flash_attn_varlen_func(
        unseen[0], unseen[1], unseen[2], cu_q, cu_k, max(lengths[0]), max(lengths[1]), causal=True
    )
    assert isinstance(packed_out, Tensor)
    dout = torch.ones_like(packed_out)
    dout[cu_q[1] : cu_q[2]] = float("nan")

    def call() -> tuple[Tensor, ...]:
        return torch.autograd.grad(packed_out, unseen, dout, retain_graph=True)

    with without_hopper():
        wanted = call()
    for ours, exact, cuts in zip(call(), wanted, (cu_q, cu_k, cu_k), strict=True):
        keep = torch.ones(len(ours), dtype=torch.bool, device=DEVICE)
        keep[cuts[1] : cuts[2]] = False
        assert_close((ours[keep],), (exact[keep],))
