"""The backward of `attention` for Hopper in the harness, where copies and products are badly timed.

It sums over the same blocks in the same order as the plain kernels for sm_80, which
test_attention.py compares with the reference. Here, where products are summed alike, both must give
the same bits. Head dims between its columns must give those of inputs with zeros after them.
The last section runs it on a Hopper GPU where there is one, as test_hopper.py does all cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ral_kernels as rk
from tests.cuda_host.backend import Kernels, host_library, on_host
from tests.cuda_host.build import HARNESS, sources_of
from tests.cuda_host.test_attention import HALF, packed
from tests.cuda_host.test_hopper import (
    DEVICE,
    EVERY_CASE,
    FWD_SM90,
    HEAD_DIMS_ON_GPU,
    assert_close,
    assert_same_bits,
    call,
    columns_of,
    plain_entry,
    plain_outputs,
    widened,
    without_hopper,
)
from tests.cuda_host.test_hopper import SOURCES as FORWARD_SOURCES
from tests.ops import test_attention as common
from tests.ops.attention_cases import CASES, AttentionCase, AttentionInputs

HOPPER_SOURCES = (*sources_of("attention/bwd*"), str(HARNESS / "hopper_bwd_for_tests.cu"))
SOURCES = tuple(dict.fromkeys((*FORWARD_SOURCES, *HOPPER_SOURCES)))
BWD, BWD_SM90 = "ral_cuda_attention_bwd", "ral_cuda_attention_bwd_sm90"

# A consumer has 64 keys (dk, dv) or queries (dq), a CTA 64, 128 or 192 of them. A buffer is used
# again after 64, 128 or 192 rows of the other side.
CONSUMERS = [
    AttentionCase("heads_share_a_ring", 200, 140, num_heads=6, num_kv_heads=2, spans="ragged"),
    AttentionCase("consumers_differ", 430, 430, spans="equal", options={"window": (9, 0)}),
    AttentionCase("last_consumer_has_one_key", 90, 129, head_dim=128, spans="equal"),
    AttentionCase("last_consumer_has_no_key", 90, 190, spans="equal", key_padding="right"),
    AttentionCase("keys_that_no_query_sees", 40, 300, options={"window": (5, 0)}),
    AttentionCase(
        "rings_of_256", 330, 270, 1, 2, 1, 256, spans="ragged", options={"is_causal": True}
    ),
    AttentionCase(
        "a_span_every_few_keys_256",
        200,
        140,
        1,
        2,
        1,
        256,
        spans="equal",
        num_spans=60,
        key_padding="left",
    ),
    *(
        AttentionCase(
            f"rows_and_many_spans_{head_dim}",
            160,
            140,
            1,
            2,
            1,
            head_dim,
            spans="equal",
            num_spans=60,
            options={"rows": (70, 101)},
        )
        for head_dim in (128, 256)
    ),
    AttentionCase("no_query_sees_256", 40, 300, 1, 1, 1, 256, options={"window": (5, 0)}),
]


@pytest.fixture(scope="session")
def hopper(build_folder: Path) -> Kernels:
    return host_library(build_folder, (), SOURCES)


Found = dict[str, Tensor]


@contextmanager
def backward_by(library: Kernels, entry: str, order: int) -> Iterator[None]:
    functions = library.functions
    with on_host(library), mock.patch.object(functions, BWD, getattr(functions, entry)):
        library.set_order(order)
        try:
            yield
        finally:
            library.set_order(0)


class Backward:
    """A backward that the plain kernels for sm_80 have done, and those for Hopper can do.

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
        columns = columns_of(case)
        self._inputs = inputs = case.inputs(dtype).requires_grad_()
        wide_inputs = widened(inputs, columns)
        with on_host(library):
            outputs = wide = plain_outputs(library, wide_inputs, columns)
            if wide_inputs is not inputs:
                outputs = call(library, FWD_SM90, 1, inputs)
        self._outputs = outputs
        self._douts = douts = [
            x if wanted else None
            for x, wanted in zip(common.output_gradients(outputs), given, strict=True)
        ]
        zeros = columns - inputs.v.shape[-1]
        dout = douts[0] if douts[0] is None else F.pad(douts[0], (0, zeros))
        found = self._gradients(plain_entry(BWD, columns), 0, wide, wide_inputs, [dout, *douts[1:]])
        tensors = inputs.differentiable()
        self.wanted: Found = {x: found[x][..., : tensors[x].shape[-1]] for x in found}

    def _gradients(
        self, entry: str, order: int, outputs: common.Outputs, inputs: AttentionInputs,
        douts: list[Tensor | None],
    ) -> Found:  # fmt: skip
        with backward_by(self._library, entry, order):
            return common.gradients(outputs, inputs, douts, retain_graph=True)

    def on_hopper(self, order: int) -> Found:
        return self._gradients(BWD_SM90, order, self._outputs, self._inputs, self._douts)


class PackedBackward:
    """The same of packed sequences. The second is NaN, and its gradients are left out."""

    def __init__(
        self, library: Kernels, lengths_q: list[int], lengths_k: list[int], head_dim: int
    ) -> None:
        self._library = library
        *leaves, cu_q, cu_k = packed(0, lengths_q, lengths_k, head_dim)
        self._tensors = [x.detach() for x in leaves]
        self._cuts = [cu_q[1:3], cu_k[1:3], cu_k[1:3]]
        for x, (start, stop) in zip(self._tensors, self._cuts, strict=True):
            x[start:stop] = float("nan")
            x.requires_grad_()
        num_keys = sum(lengths_k)
        spans = rk.Spans(torch.arange(num_keys) * 6 // num_keys, 6)
        with on_host(library):
            self._outputs = rk.flash_attn_varlen_func(
                *self._tensors, cu_q, cu_k, max(lengths_q), max(lengths_k),
                causal=True, spans=spans,
            )  # fmt: skip
        self._douts = [common.random_like(x, seed) for seed, x in enumerate(self._outputs)]
        self._douts[0][cu_q[1] : cu_q[2]] = float("nan")
        self.wanted = self._gradients(plain_entry(BWD, head_dim), 0)

    def _gradients(self, entry: str, order: int) -> Found:
        with backward_by(self._library, entry, order):
            found = torch.autograd.grad(
                self._outputs, self._tensors, self._douts, retain_graph=True
            )
            assert self._library.calls == {"bwd": 1}
        return {
            name: torch.cat([x[:start], x[stop:]])
            for name, x, (start, stop) in zip("qkv", found, self._cuts, strict=True)
        }

    def on_hopper(self, order: int) -> Found:
        return self._gradients(BWD_SM90, order)


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


@pytest.mark.parametrize("case", [*CONSUMERS[:3], CONSUMERS[-2]], ids=lambda case: case.name)
def test_any_order_gives_the_same_bits(case: AttentionCase, hopper: Kernels) -> None:
    assert_agree(*both(hopper, case, HALF[1 - len(case.name) % 2], range(2, 4)))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_without_a_gradient_of_out(head_dim: int, hopper: Kernels) -> None:
    """Boxes of zeros stand for dout: dv is exactly 0."""
    case = AttentionCase("marginals", 70, 150, head_dim=head_dim, spans="ragged")
    wanted, found = both(hopper, case, torch.bfloat16, range(1, 3), (False, True, True))
    assert_agree(wanted, found)
    assert not found[0]["v"].any() and found[0]["q"].any() and found[0]["k"].any()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_packed_sequences_do_not_see_each_other(head_dim: int, hopper: Kernels) -> None:
    """NaN in one sequence stays there, although its rows are copied with its neighbours'."""
    lengths = [65, 131, 1, 9, 200], [65, 131, 20, 9, 210]
    backward = PackedBackward(hopper, *lengths, head_dim)
    assert_agree(backward.wanted, [backward.on_hopper(1)])


def hide_nan(inputs) -> None:
    """NaN in padded keys and values."""
    hidden = ~inputs.options["key_padding_mask"][:, None, :, None]
    assert hidden.any()
    with torch.no_grad():
        for x in (inputs.k, inputs.v):
            x.masked_fill_(hidden.expand_as(x), float("nan"))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_rows_behind_padding_are_not_read(head_dim: int, hopper: Kernels) -> None:
    case = AttentionCase(
        "padded", 130, 300, batch_size=2, head_dim=head_dim, key_padding="left", spans="equal"
    )
    inputs = case.inputs(torch.bfloat16)
    hide_nan(inputs)
    inputs.requires_grad_()
    with on_host(hopper):
        outputs = rk.attention(
            inputs.q, inputs.k, inputs.v, inputs.spans, backend="cuda", **inputs.options
        )
    with backward_by(hopper, BWD_SM90, 1):
        found = common.gradients(outputs, inputs, common.output_gradients(outputs))
    for name, gradient in found.items():
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
    assert reason == b"a soft cap, span_bias or attn_mask"


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
