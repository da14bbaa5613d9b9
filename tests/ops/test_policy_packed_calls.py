"""Packed sequences: threads, work and scratch, torch.library, torch.compile, rows, offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

import ral_kernels as rk
from ral_kernels.ops.policy import attention_divergence, attention_policy, ral_loss
from ral_kernels.ops.policy import divergence as divergence_module
from ral_kernels.ops.policy.arguments import PolicyDivergenceGradients
from ral_kernels.ops.policy.interface import resolve_call
from ral_kernels.runtime import cpu_library
from ral_kernels.snapshot import AttentionSnapshot
from ral_kernels.targets import AttentionTarget
from tests.ops.packed_cases import BY_NAME, RAGGED, PackedCase, PackedInputs, offsets
from tests.ops.test_policy import op_inputs_of, random_like
from tests.ops.test_policy_divergence import snapshot_of

DTYPES = (torch.float32, torch.bfloat16)

# -- threads and work ------------------------------------------------------------------------------

# On 2 and 3 threads, the first two are split among all, and the others get one thread each.
UNEVEN = ((200, 400), (130, 300), *(((4 * i) % 23, (7 * i) % 41) for i in range(30)))


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_bits_do_not_depend_on_threads(softcap: float | None, dtype: torch.dtype) -> None:
    case = PackedCase("uneven", UNEVEN, tail=(5, 6), options={"softcap": softcap})
    inputs = case.inputs(dtype).requires_grad_()
    other = case.snapshot_inputs(dtype)
    both = (inputs.q, inputs.k)
    options = {**inputs.options, "backend": "cpu"}

    def run(num_threads: int) -> list[Tensor]:
        torch.set_num_threads(num_threads)
        snapshot = snapshot_of(other, **other.packing)
        p = attention_policy(*both, **options)
        value = attention_divergence(*both, snapshot, **options)
        loss = ral_loss(*both, snapshot, random_like(torch.empty(len(UNEVEN)), 2), **options)
        return [
            p, value, loss, *torch.autograd.grad(p, both, random_like(p, 1)),
            *torch.autograd.grad(value, both, random_like(value, 2)),
            *torch.autograd.grad(loss, both),
        ]  # fmt: skip

    first = run(1)
    for num_threads in (2, 3, 2):
        for a, b in zip(first, run(num_threads), strict=True):
            assert torch.equal(a, b)


def test_one_sequence_gives_the_bits_of_the_padded_call(packed_backend: str) -> None:
    inputs = BY_NAME["one_sequence"].inputs(torch.float32).requires_grad_()
    both, (alone,) = (inputs.q, inputs.k), inputs.sequences()
    other = BY_NAME["one_sequence"].snapshot_inputs(torch.float32)
    found = []
    for call, packing in ((inputs, other.packing), (alone, {})):
        snapshot = snapshot_of(PackedInputs(other.q, other.k, {"is_causal": True}), **packing)
        options = {**call.options, "backend": packed_backend}
        p = attention_policy(*both, **options)
        loss = ral_loss(*both, snapshot, torch.ones(1), **options)
        dp = random_like(p, 1)
        grads = (*torch.autograd.grad(p, both, dp), *torch.autograd.grad(loss, both))
        found.append((p, loss, *grads))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


class Products(TorchDispatchMode):
    """Counts the multiplications of matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func is torch.ops.aten.bmm.default:
            self.count += args[0].numel() * args[1].shape[2]
        return func(*args, **(kwargs or {}))


@pytest.mark.slow(stands_in="test_scratch_is_that_of_each_sequence")
def test_work_is_the_sum_over_sequences() -> None:
    """The products of the reference backend, counted: Σ T_i N_i, not S · max T · max N."""
    case = PackedCase("skewed", ((64, 512), *(((4, 16),) * 15)), head_dim=8)

    def products(inputs: PackedInputs) -> int:
        snapshot = snapshot_of(inputs, **inputs.packing)
        options = {"spans": None, "span_bias": None, "scope": None, "exclude_self": True,
            "scale": None, "window": None, "softcap": None, "key_padding_mask": None, "rows": None,
            "cu_seqlens_q": None, "cu_seqlens_k": None}  # fmt: skip
        call = resolve_call("", inputs.q, inputs.k, **{**options, **inputs.options})
        args = divergence_module.streaming_args("", call, snapshot, "jsd")
        assert args is not None
        outputs = divergence_module._allocate_outputs(args)
        gradients = PolicyDivergenceGradients(
            torch.ones_like(outputs.value),
            *divergence_module.allocate_gradients(args, False)[:2],
            None,
        )
        with Products() as counter:
            divergence_module.BACKENDS["reference"].fwd(args, outputs)
            divergence_module.BACKENDS["reference"].bwd(args, outputs, gradients)
        return counter.count

    whole = case.inputs(torch.float32)
    alone = [products(PackedInputs(x.q, x.k, {"is_causal": True})) for x in whole.sequences()]
    assert products(whole) == sum(alone)
    assert alone[0] < sum(alone) < 1.1 * alone[0]  # the padded batch: 16 * alone[0]


def test_scratch_is_that_of_each_sequence() -> None:
    """What the CPU kernels allocate: the padded batch takes 16 times the longest sequence."""
    if (reason := rk.available_backends()["cpu"]) != "yes":
        pytest.skip(reason)
    case = PackedCase("skewed", ((64, 2048), *(((4, 16),) * 15)))
    inputs = case.inputs(torch.float32).requires_grad_()
    longest = replace(case, lengths=case.lengths[:1]).inputs(torch.float32).requires_grad_()

    def scratch(x: PackedInputs) -> tuple[int, int]:
        snapshot = snapshot_of(x, **x.packing)
        count = x.options["cu_seqlens_q"].shape[0] - 1
        cpu_library.scratch(reset=True)
        ral_loss(x.q, x.k, snapshot, torch.ones(count), backend="cpu", **x.options)
        return cpu_library.scratch()

    largest, total = scratch(inputs)
    alone, _ = scratch(longest)
    assert 0 < largest <= alone
    assert total < 2 * alone


# -- torch.library, torch.compile, fake tensors ----------------------------------------------------


@pytest.mark.slow(stands_in="test_fake_tensors")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck(packed_backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args = op_inputs_of(BY_NAME["bias_per_span"].inputs(torch.float32), monkeypatch, packed_backend)
    torch.library.opcheck(torch.ops.ral.policy_fwd.default, args)
    with torch.no_grad():
        outputs = torch.ops.ral.policy_fwd(*args)
    detached = [x.detach() if isinstance(x, Tensor) else x for x in args]
    dp = random_like(outputs[0], 1)
    torch.library.opcheck(
        torch.ops.ral.policy_bwd.default, (*detached, *outputs, dp, args[3] is not None, False)
    )


@pytest.mark.slow(stands_in="test_fake_tensors")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_opcheck_of_the_loss(packed_backend: str) -> None:
    inputs = BY_NAME["tail"].inputs(torch.float32).requires_grad_()
    snapshot = snapshot_of(BY_NAME["tail"].snapshot_inputs(torch.float32), **inputs.packing)
    op, names = torch.ops.ral.policy_divergence_loss.default, ("cu_seqlens_q", "cu_seqlens_k")
    args = (
        *(inputs.q, inputs.k, None, None, None, *(inputs.options[x] for x in names)),
        *(snapshot.query_starts, snapshot.q, snapshot.k, *(None,) * 6, 0, 0.25, -1, 0, 0.0, True),
        *(61, 127, snapshot.scale, -1, 0, 0.0, "jsd", packed_backend),
        *(random_like(torch.empty(1, inputs.q.shape[2]), 2), None, None, False),
    )
    torch.library.opcheck(op, args)


@pytest.mark.slow(stands_in="test_fake_tensors")
def test_compile(packed_backend: str) -> None:
    """One graph where scalar outputs are captured."""
    inputs = BY_NAME["tail"].inputs(torch.float32).requires_grad_()
    snapshot = snapshot_of(BY_NAME["tail"].snapshot_inputs(torch.float32), **inputs.packing)
    options = {**inputs.options, "backend": packed_backend}

    def f(q: Tensor, k: Tensor) -> Tensor:
        loss = ral_loss(q * 2, k, snapshot, torch.ones(len(RAGGED)), **options)
        return loss + attention_policy(q, k, **options).square().sum()

    check_compiled(f, inputs, fullgraph=True)


@pytest.mark.slow(stands_in="test_fake_tensors")
@pytest.mark.parametrize("name", ["tail", "rows"])
def test_compile_with_a_graph_break(name: str) -> None:
    """Where the lengths are read, as a plain torch.compile does."""
    inputs = BY_NAME[name].inputs(torch.float32).requires_grad_()

    def f(q: Tensor, k: Tensor) -> Tensor:
        return attention_policy(q * 2, k, **inputs.options).square().sum()

    check_compiled(f, inputs, fullgraph=False)


class _Packed(torch.nn.Module):
    """A policy, and losses against a snapshot and a target, of sequences by their offsets."""

    def forward(self, q: Tensor, k: Tensor, offsets: Tensor, rows: Any = None) -> list[Tensor]:
        packing = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        advantages = torch.tensor([1.0, -0.5, 0.25])
        snapshot = AttentionSnapshot(q.flip(1), k, **packing)
        target = AttentionTarget(torch.ones(1, 1, k.shape[2]))
        return [
            attention_policy(q, k, rows=rows, **packing),
            ral_loss(q, k, snapshot, advantages, reduction="sequence_mean", **packing),
            ral_loss(q, k, target, advantages, kind="cross_entropy", **packing),
        ]


@pytest.mark.slow(stands_in="test_fake_tensors")
def test_export() -> None:
    """One graph for other offsets, and for gradients; chosen rows are refused by name."""
    q, k = torch.randn(1, 4, 20, 8).requires_grad_(), torch.randn(1, 2, 20, 8)
    module, first, other = _Packed(), *(torch.tensor(x, dtype=torch.int32) for x in OFFSETS)
    exported = torch.export.export(module, (q, k, first)).module()
    for given in (first, other):  # whose longest sequence is longer
        got, wanted = exported(q, k, given), module(q, k, given)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
            gradients = (torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (a, b))
            torch.testing.assert_close(*gradients, rtol=0, atol=0)
    with pytest.raises(NotImplementedError, match=r"rows is not supported .* under torch\.export"):
        torch.export.export(module, (q, k, first, [(0, 2), (0, 3), (1, 4)]))


OFFSETS = [0, 5, 9, 20], [0, 2, 19, 20]


def check_compiled(f: Callable[..., Tensor], inputs: PackedInputs, fullgraph: bool) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_scalar_outputs=fullgraph):
        compiled = torch.compile(f, fullgraph=fullgraph, backend="aot_eager")
        both = (inputs.q, inputs.k)
        got, wanted = compiled(*both), f(*both)
        torch.testing.assert_close(got, wanted)
        for a, b in zip(
            torch.autograd.grad(got, both), torch.autograd.grad(wanted, both), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_fake_tensors() -> None:
    inputs = BY_NAME["tail"].inputs(torch.bfloat16)
    wanted = attention_policy(inputs.q, inputs.k, **inputs.options)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        q, k = mode.from_tensor(inputs.q), mode.from_tensor(inputs.k)
        packing = {name: mode.from_tensor(x) for name, x in inputs.packing.items()}
        fake = attention_policy(q, k, **packing)
    assert (fake.shape[:2], fake.dtype) == (wanted.shape[:2], wanted.dtype)


def test_functional_transforms(packed_backend: str) -> None:
    """grad and vmap over values that share their offsets."""
    inputs = BY_NAME["tail"].inputs(torch.float32)
    options = {**inputs.options, "backend": packed_backend}

    def f(q: Tensor, k: Tensor) -> Tensor:
        return attention_policy(q, k, **options).square().sum()

    both = (inputs.q.requires_grad_(), inputs.k.requires_grad_())
    wanted = torch.autograd.grad(f(*both), both)
    for a, b in zip(torch.func.grad(f, argnums=(0, 1))(*both), wanted, strict=True):
        assert torch.equal(a, b)
    several = torch.stack([inputs.q, 2 * inputs.q])
    mapped = torch.vmap(f, in_dims=(0, None))(several, inputs.k)
    torch.testing.assert_close(mapped, torch.stack([f(q, inputs.k) for q in several]))


@pytest.mark.slow(stands_in="tests/ops/test_policy_packed.py::test_policy")
def test_gradcheck() -> None:
    """float64 on the reference backend, all three tensors."""
    case = PackedCase("small", ((2, 3), (0, 2), (3, 2), (1, 0)), rows=((0, 2), (0, 0), (1, 3),
        (0, 1)), tail=(1, 1), num_heads=2, num_kv_heads=1, head_dim=3, num_spans=2,
        span_bias="full")  # fmt: skip
    inputs = case.inputs(torch.float64).requires_grad_()
    options = {k: v for k, v in inputs.options.items() if k != "span_bias"}

    def f(q: Tensor, k: Tensor, span_bias: Tensor) -> Tensor:
        return attention_policy(q, k, span_bias=span_bias, **options)

    assert torch.autograd.gradcheck(f, tuple(inputs.differentiable().values()))


# -- rows and offsets ------------------------------------------------------------------------------


def test_rows_are_rows_of_the_whole(packed_backend: str) -> None:
    inputs = BY_NAME["rows"].inputs(torch.float32)
    part = attention_policy(inputs.q, inputs.k, backend=packed_backend, **inputs.options)
    options = {k: v for k, v in inputs.options.items() if k != "rows"}
    whole = attention_policy(inputs.q, inputs.k, backend=packed_backend, **options)
    begin, index = options["cu_seqlens_q"].tolist(), []
    for i, x in enumerate(inputs.sequences()):
        index += [begin[i] + row for row in range(x.q.shape[2])[x.rows]]
    torch.testing.assert_close(part, whole[:, index])


def test_gradients_of_rows_are_zero_elsewhere(packed_backend: str) -> None:
    inputs = BY_NAME["rows"].inputs(torch.float32).requires_grad_()
    p = attention_policy(inputs.q, inputs.k, backend=packed_backend, **inputs.options)
    (dq,) = torch.autograd.grad(p.square().sum(), inputs.q)
    chosen = torch.zeros(inputs.q.shape[2], dtype=torch.bool)
    begin = inputs.options["cu_seqlens_q"].tolist()
    for i, x in enumerate(inputs.sequences()):
        chosen[begin[i] : begin[i + 1]][x.rows] = True
    assert dq[:, :, chosen].any() and not dq[:, :, ~chosen].any()


def test_offsets_need_not_be_contiguous(packed_backend: str) -> None:
    inputs = BY_NAME["ragged"].inputs(torch.float32)
    options = dict(inputs.options)
    wanted = attention_policy(inputs.q, inputs.k, backend=packed_backend, **options)
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        options[name] = torch.stack([options[name], options[name]], dim=1)[:, 0]
    assert torch.equal(
        attention_policy(inputs.q, inputs.k, backend=packed_backend, **options), wanted
    )


def test_other_sequences_are_refused() -> None:
    """A snapshot compares with calls of its own sequences, rows and kind of batch."""
    q, k = torch.randn(1, 2, 6, 8), torch.randn(1, 2, 9, 8)
    packing = {"cu_seqlens_q": offsets([2, 4]), "cu_seqlens_k": offsets([4, 5])}
    snapshot = AttentionSnapshot(q, k, **packing)
    padded = AttentionSnapshot(q, k)
    for changes, reference, wanted in (
        ({"cu_seqlens_q": offsets([3, 3])}, snapshot, r"sequences, cu_seqlens_q\[1\]=3; got 2"),
        ({"cu_seqlens_k": offsets([3, 6])}, snapshot, r"sequences, cu_seqlens_k\[1\]=3; got 4"),
        ({"cu_seqlens_q": offsets([2, 2, 2]), "cu_seqlens_k": offsets([4, 2, 3])}, snapshot,
         "a snapshot of S=3 sequences; got 2"),
        ({"rows": [(1, 2), (0, 4)]}, snapshot, r"same sequences, cu_seqlens_q\[1\]=1; got 2"),
        ({"cu_seqlens_q": None, "cu_seqlens_k": None}, snapshot, "got reference alone packed"),
        ({}, padded, "got the call alone packed"),
    ):  # fmt: skip
        with pytest.raises(
            ValueError, match=f"^attention_divergence: reference must be .*{wanted}"
        ):
            attention_divergence(q, k, reference, **{**packing, **changes})
    moved = AttentionSnapshot(q, k, rows=[(0, 1), (0, 4)], **packing)
    with pytest.raises(ValueError, match=r"same sequences, query_starts\[0\]=3; got 2"):
        attention_divergence(q, k, moved, rows=[(1, 2), (0, 4)], **packing)
