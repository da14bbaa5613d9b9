"""What torch's scaled_dot_product_attention does on the CPU, asked of ours in its place."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.utils.checkpoint import checkpoint

import ral_kernels as rk
from tests.conformance.conftest import Refused, slow
from tests.ops.accuracy import assert_accurate, floor_of

SDPA = Callable[..., Tensor]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ours: SDPA = rk.scaled_dot_product_attention
theirs: SDPA = F.scaled_dot_product_attention


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def qkv(
    heads: int = 3, kv_heads: int = 3, lengths: tuple[int, int] = (9, 13), head_dim: int = 16
) -> list[Tensor]:
    shapes = ((heads, lengths[0]), (kv_heads, lengths[1]), (kv_heads, lengths[1]))
    return [normal(2, *shape, head_dim, seed=i) for i, shape in enumerate(shapes)]


def with_gradients(f: SDPA, tensors: list[Tensor], **options: Any) -> list[Tensor]:
    inputs = [x.detach().requires_grad_() for x in tensors]
    out = f(*inputs, **options)
    dout = normal(*out.shape, seed=9, dtype=out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, dout)]


def assert_as_torch(tensors: list[Tensor], dtype: torch.dtype, **options: Any) -> None:
    """Values and gradients at most at twice torch's error against float64."""

    def cast(to: torch.dtype) -> tuple[list[Tensor], dict[str, Any]]:
        mask = options.get("attn_mask")
        changed = {}
        if type(mask) is Tensor and mask.is_floating_point():
            changed = {"attn_mask": mask.to(dtype).to(to)}
        return [x.to(dtype).to(to) for x in tensors], options | changed

    inputs, given = cast(dtype)
    exact, given_exactly = cast(torch.float64)
    got = with_gradients(ours, inputs, **given)
    base = with_gradients(theirs, inputs, **given)
    truth = with_gradients(theirs, exact, **given_exactly)
    for name, x, true, baseline in zip(("out", "dq", "dk", "dv"), got, truth, base, strict=True):
        assert x.dtype == dtype
        assert_accurate(name, x, true, baseline, floor_of(dtype))


def assert_same(f: Callable[[SDPA], Any], tolerance: float = 1e-5) -> None:
    """`f`, with ours in place of torch's, gives what it gives with torch's."""
    torch.testing.assert_close(f(ours), f(theirs), rtol=tolerance, atol=tolerance)


MASKS: dict[str, tuple[int, ...]] = {
    "all": (2, 3, 9, 13),
    "heads_shared": (2, 1, 9, 13),
    "samples_shared": (1, 3, 9, 13),
    "queries_and_keys": (9, 13),
    "three_dims": (3, 9, 13),
    "keys_of_each_sample": (2, 1, 1, 13),
    "queries_alone": (9, 1),
    "one_number": (1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float", "float32"])
@pytest.mark.parametrize("shape", MASKS)
def test_masks_that_broadcast(shape: str, kind: str, dtype: torch.dtype) -> None:
    mask = normal(*MASKS[shape], seed=4)
    if kind == "bool":
        mask = mask > -0.7
    if kind != "float32":
        assert_as_torch(qkv(), dtype, attn_mask=mask)
        return
    # Ours takes a float32 mask with inputs of any dtype.
    inputs = [x.to(dtype) for x in qkv()]
    wanted = theirs(*(x.double() for x in inputs), attn_mask=mask.double())
    tolerance = 4 * torch.finfo(dtype).eps
    got = ours(*inputs, attn_mask=mask)
    torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [(9, 13), (13, 9), (64, 64), (1, 70)], ids=str)
@pytest.mark.parametrize("variant", [causal_upper_left, causal_lower_right])
def test_causal_bias(variant: Any, lengths: tuple[int, int], dtype: torch.dtype) -> None:
    assert_as_torch(qkv(lengths=lengths), dtype, attn_mask=variant(*lengths))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(4, 2), (6, 1), (8, 4), (3, 3)], ids=str)
@pytest.mark.parametrize("options", ["plain", "causal", "masked"])
def test_gqa(options: str, heads: tuple[int, int], dtype: torch.dtype) -> None:
    given: dict[str, Any] = {"enable_gqa": True}
    if options == "causal":
        given["is_causal"] = True
    elif options == "masked":
        given["attn_mask"] = normal(2, 1, 9, 13, seed=4) > -0.5
    assert_as_torch(qkv(*heads), dtype, **given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("lengths", [(1, 1), (267, 267), (17, 130), (130, 17), (64, 1030)], ids=str)
@pytest.mark.parametrize("head_dim", [1, 8, 40, 64, 128])
def test_shapes(
    head_dim: int, lengths: tuple[int, int], is_causal: bool, dtype: torch.dtype
) -> None:
    assert_as_torch(qkv(lengths=lengths, head_dim=head_dim), dtype, is_causal=is_causal)


@pytest.mark.parametrize("scale", [0.01, 1.0, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scale(scale: float, dtype: torch.dtype) -> None:
    assert_as_torch(qkv(), dtype, scale=scale)


@pytest.mark.parametrize("scale", [0.0, -1.0])
def test_scale_that_is_not_positive(scale: float, refused: Refused) -> None:
    with refused(ValueError, "scale must be"):
        ours(*qkv(), scale=scale)


EMPTY = {
    "no_queries": ((2, 3, 0, 8), (2, 3, 7, 8)),
    "no_keys": ((2, 3, 5, 8), (2, 3, 0, 8)),
    "no_batch": ((0, 3, 5, 8), (0, 3, 7, 8)),
}


@pytest.mark.parametrize("kind", EMPTY)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty(kind: str, dtype: torch.dtype) -> None:
    q, k = EMPTY[kind]
    tensors = [normal(*q, dtype=dtype), normal(*k, dtype=dtype), normal(*k, dtype=dtype)]
    assert_same(lambda f: with_gradients(f, tensors))


@pytest.mark.parametrize("shape", [(2, 3, 5, 0), (2, 0, 5, 8)], ids=str)
def test_no_heads_or_no_head_dim(shape: tuple[int, ...], refused: Refused) -> None:
    with refused(ValueError, "query must be .* with H >= 1 and D >= 1"):
        ours(*(normal(*shape) for _ in range(3)))


@pytest.mark.parametrize("kind", ["bool_row", "bool_all", "infinite_row", "infinite_all"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fully_masked(kind: str, dtype: torch.dtype) -> None:
    """A query that sees no key: zeros, and no gradient, as torch's safe softmax has it."""
    mask = torch.ones(9, 13, dtype=torch.bool)
    mask[slice(None) if kind.endswith("all") else 4] = False
    if kind.startswith("infinite"):
        mask = torch.zeros(9, 13, dtype=dtype).masked_fill(~mask, -torch.inf)
    tensors = [x.to(dtype) for x in qkv()]
    got = with_gradients(ours, tensors, attn_mask=mask)
    assert not any(x.isnan().any() for x in got)
    rows = slice(None) if kind.endswith("all") else 4
    assert not got[0][:, :, rows].any() and not got[1][:, :, rows].any()
    if kind.endswith("row"):
        assert_as_torch(qkv(), dtype, attn_mask=mask)


@pytest.mark.parametrize("backend", list(SDPBackend.__members__.values())[1:], ids=str)
def test_sdpa_kernel_context(backend: Any) -> None:
    """It chooses among torch's kernels and says nothing to ours."""
    wanted = theirs(*qkv(), is_causal=True)
    with sdpa_kernel(backend):
        got = ours(*qkv(), is_causal=True)
    torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inputs", ["float32", "mixed"])
def test_autocast(dtype: torch.dtype, inputs: str) -> None:
    tensors = qkv()
    if inputs == "mixed":
        tensors[1] = tensors[1].to(dtype)

    def run(f: SDPA) -> list[Tensor]:
        with torch.autocast("cpu", dtype=dtype):
            return with_gradients(f, tensors)

    got, wanted = run(ours), run(theirs)
    assert [x.dtype for x in got] == [x.dtype for x in wanted]
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


class Attention(nn.Module):
    """Projections around the attention under test."""

    def __init__(self, f: SDPA) -> None:
        super().__init__()
        self.f = f
        self.project = nn.Linear(16, 3 * 16)
        with torch.no_grad():
            self.project.weight.copy_(normal(48, 16, seed=3) / 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).unflatten(-1, (3, 2, 8)).unbind(-3)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        return self.f(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def module_gradients(module: nn.Module, x: Tensor, run: Callable[..., Tensor]) -> list[Tensor]:
    module.zero_grad()
    x = x.detach().requires_grad_()
    out = run(x)
    out.square().sum().backward()
    leaves = [x, *module.parameters()]
    return [out, *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.fixture
def modules() -> tuple[Attention, Attention]:
    """Ours, torch's, and both of the same weights."""
    mine = Attention(ours)
    other = copy.deepcopy(mine)
    other.f = theirs
    return mine, other


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing(modules: tuple[Attention, Attention], use_reentrant: bool) -> None:
    x = normal(2, 6, 16)
    run = functools.partial(checkpoint, modules[0], use_reentrant=use_reentrant)
    got = module_gradients(modules[0], x, run)
    wanted = module_gradients(modules[1], x, modules[1])
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options", [pytest.param(x, marks=slow("test_compile") if x else []) for x in ("", "dynamic")]
)
def test_compile(modules: tuple[Attention, Attention], options: str) -> None:
    """Without a graph break, forward and backward, at one shape or at any."""
    torch.compiler.reset()
    run = torch.compile(
        modules[0], fullgraph=True, backend="aot_eager", dynamic=options == "dynamic"
    )
    for length in (6, 11) if options else (6,):
        x = normal(2, length, 16)
        got = module_gradients(modules[0], x, run)
        wanted = module_gradients(modules[1], x, modules[1])
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@slow("test_compile")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("call", ["plain", "masked", "gqa", "causal_bias"])
def test_inductor(call: str, dynamic: bool) -> None:
    """The default compiler, with the gradients."""
    torch.compiler.reset()
    options: dict[str, Any] = {"enable_gqa": True} if call == "gqa" else {}
    heads = (4, 2) if call == "gqa" else (3, 3)

    def run(f: SDPA, length: int) -> list[Tensor]:
        if call == "masked":
            options["attn_mask"] = normal(length, 13, seed=4) > -0.5
        elif call == "causal_bias":
            options["attn_mask"] = causal_lower_right(length, 13)
        return with_gradients(f, qkv(*heads, lengths=(length, 13)), **options)

    compiled = torch.compile(ours, fullgraph=True, dynamic=dynamic)
    for length in (9, 12) if dynamic else (9,):
        torch.testing.assert_close(run(compiled, length), run(theirs, length))


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=slow("test_export"))])
@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=slow("test_export"))])
def test_export(modules: tuple[Attention, Attention], strict: bool, dynamic: bool) -> None:
    x = normal(2, 6, 16)
    shapes = {"x": {1: torch.export.Dim("length", min=2, max=64)}} if dynamic else None
    program = torch.export.export(modules[0], (x,), dynamic_shapes=shapes, strict=strict)
    assert "ral.attention_fwd" in str(program.graph)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    loaded = torch.export.load(buffer).module()
    for length in (6, 11) if dynamic else (6,):
        x = normal(2, length, 16)
        torch.testing.assert_close(loaded(x), modules[1](x))


@slow("test_export")
def test_aot_inductor(modules: tuple[Attention, Attention], tmp_path: Any) -> None:
    """A package of compiled code, loaded again in this process."""
    x = normal(2, 6, 16)
    program = torch.export.export(modules[0].requires_grad_(False), (x,))
    package = torch._inductor.aoti_compile_and_package(
        program, package_path=str(tmp_path / "attention.pt2")
    )
    loaded = torch._inductor.aoti_load_package(package)
    torch.testing.assert_close(loaded(x), modules[1](x))


def test_grad_of_functorch() -> None:
    q, k, v = qkv()

    def gradients(f: SDPA) -> Any:
        return torch.func.grad(lambda q, k, v: f(q, k, v).square().sum(), (0, 1, 2))(q, k, v)

    assert_same(gradients)


def test_vmap() -> None:
    q, k, v = (x.expand(4, *x.shape) * normal(4, 1, 1, 1, 1) for x in qkv())
    assert_same(lambda f: torch.func.vmap(f)(q, k, v))


def test_forward_mode(refused: Refused) -> None:
    """Torch has a tangent by its math path. Ours has none, and never a wrong one."""
    q, k, v = qkv()
    with refused((NotImplementedError, RuntimeError), "forward|jvp"):
        torch.func.jvp(lambda q: ours(q, k, v), (q,), (torch.ones_like(q),))


def test_double_backward(refused: Refused) -> None:
    q, k, v = (x.requires_grad_() for x in qkv())
    (dq,) = torch.autograd.grad(ours(q, k, v).square().sum(), q, create_graph=True)
    with refused((NotImplementedError, RuntimeError), "differentiable|backward"):
        dq.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode: Any) -> None:
    def run(f: SDPA) -> Tensor:
        with mode():
            return f(*(x.requires_grad_() for x in qkv()))

    assert not run(ours).requires_grad
    assert_same(run)


def test_meta_tensors() -> None:
    meta = [x.to("meta") for x in qkv()]
    got, wanted = ours(*meta), theirs(*meta)
    assert got.is_meta and got.shape == wanted.shape and got.dtype == wanted.dtype


def test_fake_tensors() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(2, 3, 9, 16)
        got, wanted = ours(q, q, q), theirs(q, q, q)
    assert got.shape == wanted.shape and got.stride()[-1] == 1


def test_nested_tensors(refused: Refused) -> None:
    q = torch.nested.nested_tensor([normal(5, 3, 16), normal(7, 3, 16)], layout=torch.jagged)
    q = q.transpose(1, 2)
    with refused((TypeError, NotImplementedError), "nested|NestedTensor"):
        ours(q, q, q)


def test_dropout(refused: Refused) -> None:
    with refused(NotImplementedError, "dropout is not supported"):
        ours(*qkv(), dropout_p=0.1)


def test_gradient_of_the_mask(refused: Refused) -> None:
    with refused(NotImplementedError, "attn_mask gets no gradient"):
        ours(*qkv(), attn_mask=normal(9, 13).requires_grad_())


def test_mask_and_is_causal(refused: Refused) -> None:
    """Torch's documentation says that both together are an error."""
    mask = torch.ones(9, 13, dtype=torch.bool)
    with refused(ValueError, "attn_mask must be None with is_causal=True"):
        ours(*qkv(), attn_mask=mask, is_causal=True)


BAD: dict[str, Callable[[SDPA], Tensor]] = {
    "dtypes_differ": lambda f: f(normal(2, 3, 5, 8), *[normal(2, 3, 5, 8).double()] * 2),
    "integers": lambda f: f(*[torch.ones(2, 3, 5, 8, dtype=torch.int64)] * 3),
    "head_dims_differ": lambda f: f(normal(2, 3, 5, 8), *[normal(2, 3, 5, 4)] * 2),
    "lengths_differ": lambda f: f(normal(2, 3, 5, 8), normal(2, 3, 7, 8), normal(2, 3, 5, 8)),
    "one_dimension": lambda f: f(*[normal(8)] * 3),
    "heads_differ": lambda f: f(normal(2, 3, 5, 8), *[normal(2, 2, 5, 8)] * 2),
    "gqa_does_not_divide": lambda f: f(
        normal(2, 3, 5, 8), *[normal(2, 2, 5, 8)] * 2, enable_gqa=True
    ),
    "mask_does_not_broadcast": lambda f: f(*[normal(2, 3, 5, 8)] * 3, attn_mask=normal(4, 5)),
    "mask_of_integers": lambda f: f(
        *[normal(2, 3, 5, 8)] * 3, attn_mask=torch.ones(5, 5, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_torch_refuses(kind: str, refused: Refused) -> None:
    if kind != "lengths_differ":  # torch's fused kernel checks less
        with pytest.raises((RuntimeError, ValueError, TypeError)):
            BAD[kind](theirs)
    with refused((TypeError, ValueError), "^scaled_dot_product_attention: .* must .*got"):
        BAD[kind](ours)
