"""Draws calls of the ops, makes some malformed, and compares the CPU backend with the reference.

A valid call must give the values and gradients of the reference backend. A malformed one must
raise TypeError, ValueError or NotImplementedError with a message of this package, or be what both
backends agree on. A crash ends the process: `python -m tests.fuzz` prints the call that did it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

import ral_kernels as rk

OPS = ("attention", "policy", "divergence", "snapshot", "loss", "rows", "packed", "sdpa")
DTYPES = {"float32": (torch.float32, 1e-3), "bfloat16": (torch.bfloat16, 0.1),
          "float16": (torch.float16, 0.02)}  # fmt: skip
REFUSALS = (TypeError, ValueError, NotImplementedError)
# How messages of this package begin.
SPEAKERS = (
    "attention", "ral_loss", "divergence", "flash_attn_varlen_func", "Spans", "AttentionSnapshot",
    "scaled_dot_product_attention",
)  # fmt: skip


@dataclass
class Plan:
    """A call as plain values: its repr makes it again."""

    seed: int
    op: str
    dtype: str
    sizes: dict[str, int]
    layouts: list[str]
    options: dict[str, Any]
    flags: list[str]
    threads: int
    fault: tuple[str, str] | None = None


@dataclass
class Call:
    """The arguments of a public function. `differentiable` names those that get a gradient."""

    function: Callable[..., Any]
    arguments: dict[str, Any]
    differentiable: list[str] = field(default_factory=list)
    takes_backend: bool = True


FLAGS = (
    "spans", "batch_ids", "bias", "mask", "offsets", "padding", "rows", "scope", "shared",
    "weights", "window",
)  # fmt: skip
POLICIES = ("policy", "divergence", "snapshot", "loss")  # those that take packed sequences
LAYOUTS = ("plain", "tokens first", "sliced", "expanded")
TENSOR_FAULTS = (
    "dtype", "integer", "less rank", "more rank", "shorter 0", "shorter 1", "shorter 2",
    "shorter 3", "no heads", "stride", "meta", "list", "none", "empty",
)  # fmt: skip
NUMBER_FAULTS = ("-1", "0", "nan", "inf", "1e39", "1e-60", "2**40", "-2**63", "text", "true", "1.5")
SPANS_FAULTS = ("edited", "far", "numpy", "longer", "shorter", "num_spans", "ids", "none", "list")


@st.composite
def plans(draw: Any, malformed: bool) -> Plan:
    group, kv_heads = draw(st.integers(1, 3)), draw(st.integers(1, 2))
    seqlen_k = draw(st.one_of(st.integers(1, 20), st.integers(1, 150)))
    plan = Plan(
        seed=draw(st.integers(0, 2**31)),
        op=draw(st.sampled_from(OPS)),
        dtype=draw(st.sampled_from(sorted(DTYPES))),
        sizes={
            "batch": draw(st.integers(1, 3)), "kv_heads": kv_heads, "heads": kv_heads * group,
            "q": draw(st.integers(1, seqlen_k)), "k": seqlen_k, "spans": draw(st.integers(1, 9)),
            "d": draw(st.integers(1, 40)), "dv": draw(st.integers(1, 40)),
        },
        layouts=[draw(st.sampled_from(LAYOUTS)) for _ in range(3)],
        options={
            "is_causal": draw(st.booleans()),
            "scale": draw(st.sampled_from([None, 0.05, 1.0])),
            "softcap": draw(st.sampled_from([None, None, 2.0])),
        },
        flags=[name for name in FLAGS if draw(st.booleans())],
        threads=draw(st.sampled_from([1, 1, 2])),
    )  # fmt: skip
    if malformed:
        kinds = (*TENSOR_FAULTS, *NUMBER_FAULTS, *SPANS_FAULTS)
        plan.fault = (draw(st.sampled_from("abcdefgh")), draw(st.sampled_from(kinds)))
    return plan


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout, with a unit last stride."""
    if layout == "tokens first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
        wide[..., 2:-1] = x
        return wide[..., 2:-1]
    if layout == "expanded":
        return x[:1].expand_as(x)
    return x.clone()


def build(plan: Plan) -> Call:
    """The call of a plan, with its fault."""
    g = torch.Generator().manual_seed(plan.seed)
    s, flags, dtype = plan.sizes, set(plan.flags), DTYPES[plan.dtype][0]
    B, H, HK, T, N, D = (s[x] for x in ("batch", "heads", "kv_heads", "q", "k", "d"))
    packs = "offsets" in flags and plan.op in POLICIES
    B = 1 if packs else B

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    def tensor(index: int, *shape: int) -> Tensor:
        return _laid_out(normal(*shape).to(dtype), plan.layouts[index])

    q, k, v = tensor(0, B, H, T, D), tensor(1, B, HK, N, D), tensor(2, B, HK, N, s["dv"])
    options: dict[str, Any] = {x: y for x, y in plan.options.items() if y is not None}
    if "window" in flags:
        options["window"] = (N // 2, N // 3)
    first, last = T // 3, T - T // 4
    if "rows" in flags:
        options["rows"] = (first, last)
    rows = last - first if "rows" in flags else T
    ids = torch.randint(-1, s["spans"], (B, N) if "batch_ids" in flags else (N,), generator=g)
    spans = rk.Spans(ids, s["spans"]) if "spans" in flags else None
    padding = torch.rand(B, N, generator=g) < 0.8 if "padding" in flags and not packs else None
    packing: dict[str, Any] = {}
    outcomes = N
    if packs:
        cuts = [sorted(torch.randint(0, n + 1, (3,), generator=g).tolist()) for n in (T, N)]
        bounds_q, bounds_k = (torch.tensor([0, *x], dtype=torch.int32) for x in cuts)
        packing = {"cu_seqlens_q": bounds_q, "cu_seqlens_k": bounds_k}
        outcomes = int(bounds_k.diff().max())
        if "rows" in flags:
            chosen = [(t // 3, t - t // 4) for t in bounds_q.diff().tolist()]
            rows, options["rows"] = sum(b - a for a, b in chosen), chosen
    if plan.op == "rows":
        p, r = (normal(B, T, N).softmax(-1) for _ in range(2))
        return _with_fault(plan, Call(rk.divergence, {"p": p, "r": r}, ["p", "r"]))
    if plan.op == "sdpa":
        arguments = {"query": q, "key": k, "value": v, "enable_gqa": True,
                     "is_causal": options["is_causal"], "scale": plan.options["scale"]}  # fmt: skip
        if "mask" in flags and not options["is_causal"]:
            arguments["attn_mask"] = torch.rand(T, N, generator=g) < 0.8
        return _with_fault(
            plan, Call(rk.scaled_dot_product_attention, arguments, ["query", "key", "value"], False)
        )
    if plan.op == "packed":
        bounds = [[0, *sorted(torch.randint(0, n + 1, (2,), generator=g).tolist()), n]
                  for n in (T, N)]  # fmt: skip
        q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
        arguments = {
            "q": q, "k": k, "v": v, "max_seqlen_q": T, "max_seqlen_k": N,
            "cu_seqlens_q": torch.tensor(bounds[0], dtype=torch.int32),
            "cu_seqlens_k": torch.tensor(bounds[1], dtype=torch.int32),
            "causal": options["is_causal"],
        }  # fmt: skip
        if spans is not None and "batch_ids" not in flags:
            arguments["spans"] = spans
        return _with_fault(plan, Call(rk.flash_attn_varlen_func, arguments, ["q", "k", "v"], False))
    arguments = {"q": q, "k": k, **options, **packing, "key_padding_mask": padding}
    if plan.op == "attention":
        arguments.update(v=v, spans=spans)
        if "mask" in flags:
            arguments["attn_mask"] = torch.rand(B, 1, T, N, generator=g) < 0.8
        if spans is not None and "bias" in flags:
            arguments["span_bias"] = normal(B, H, T, s["spans"])
        return _with_fault(
            plan, Call(rk.attention, arguments, [x for x in ("q", "k", "v", "span_bias")
                                                 if x in arguments])
        )  # fmt: skip
    if "scope" in flags:
        arguments["scope"] = torch.rand(N, generator=g) < 0.7
    given = ["q", "k"]
    if "weights" in flags:
        shape = (3 if packs else B, H) if plan.seed % 2 else (H,)
        weights = torch.rand(shape, generator=g)
        weights[..., plan.seed % H] = 0.0 if H > 1 else 1.0
        arguments["head_weights"] = weights
        given.append("head_weights")
    if plan.op == "policy":
        arguments["spans"] = spans
        if spans is not None and "bias" in flags:
            arguments["span_bias"] = normal(1, H, rows, s["spans"])
        return _with_fault(plan, Call(rk.attention_policy, arguments, given))
    if plan.op == "divergence":
        arguments["reference"] = normal(B, rows, outcomes).softmax(-1)
    else:
        same_prefix = 2 if "shared" in flags and B % 2 == 0 else 1
        old_q, old_k = normal(B, H, T, D).to(dtype), normal(B, HK, N, D).to(dtype)
        old_k = old_k if same_prefix == 1 else old_k[:1].expand_as(old_k)
        arguments["reference"] = rk.AttentionSnapshot(
            old_q, old_k, group_size=same_prefix, shared_prefix=0 if packs else N // 2,
            head_weights=arguments.get("head_weights") if plan.seed % 3 else None, **options,
            **packing,
        )  # fmt: skip
    if plan.op == "loss":
        arguments["advantages"] = normal(B, rows)
        return _with_fault(plan, Call(rk.ral_loss, arguments, given))
    return _with_fault(plan, Call(rk.attention_divergence, arguments, given))


def _with_fault(plan: Plan, call: Call) -> Call:
    if plan.fault is None:
        return call
    where, kind = plan.fault
    names = sorted(call.arguments)
    fitting: dict[str, Callable[[Any], bool]] = {
        **dict.fromkeys(TENSOR_FAULTS, lambda x: isinstance(x, (Tensor, rk.AttentionSnapshot))),
        **dict.fromkeys(NUMBER_FAULTS, lambda x: not isinstance(x, Tensor)),
        **dict.fromkeys(SPANS_FAULTS[:-2], lambda x: isinstance(x, rk.Spans)),
    }
    names = [name for name in names if fitting[kind](call.arguments[name])] or names
    name = names[ord(where) % len(names)]
    value = call.arguments[name]
    if isinstance(value, rk.AttentionSnapshot) and kind in TENSOR_FAULTS:
        parts = sorted(value._all_tensors())
        part = parts[ord(where) % len(parts)]
        setattr(value, part, _spoilt(getattr(value, part), kind))
    else:
        call.arguments[name] = _spoilt(value, kind)
    return call


def _spoilt(x: Any, kind: str) -> Any:
    numbers = {"-1": -1, "0": 0, "nan": float("nan"), "inf": float("inf"), "1e39": 1e39,
               "1e-60": 1e-60, "2**40": 2**40, "-2**63": -(2**63), "text": "1", "true": True,
               "1.5": 1.5, "none": None, "list": [1]}  # fmt: skip
    if kind in numbers:
        return numbers[kind]
    if isinstance(x, rk.Spans):
        if kind == "numpy":
            x.ids.numpy().flat[-1] = x.num_spans + 40
        elif kind in ("edited", "far"):
            x.ids.view(-1)[0] = -7 if kind == "edited" else 7 * 10**7
        elif kind == "longer":
            return x.extend_to(x.seqlen_k + 1)
        elif kind == "shorter":
            x.ids = x.ids[..., :-1]
        elif kind == "num_spans":
            x.num_spans = 0
        else:
            x.ids = x.ids.double()
        return x
    if not isinstance(x, Tensor):
        return None
    changes: dict[str, Callable[[], Tensor]] = {
        "dtype": lambda: x.double(), "integer": lambda: x.int(), "less rank": lambda: x.sum(0),
        "more rank": lambda: x[None], "no heads": lambda: x.transpose(0, min(1, x.dim() - 1))[:0],
        "stride": lambda: x.transpose(-1, max(-2, -x.dim())),
        "meta": lambda: x.to("meta"), "empty": lambda: x[:0],
        **{f"shorter {i}": functools.partial(_shorter, x, i) for i in range(4)},
    }  # fmt: skip
    return changes[kind]() if kind in changes else None


def _shorter(x: Tensor, axis: int) -> Tensor:
    axis %= max(x.dim(), 1)
    return x.narrow(axis, 0, max(x.shape[axis] - 1, 0)) if x.dim() else x


def _tensors(result: Any) -> Iterator[Tensor]:
    for x in (result,) if isinstance(result, Tensor) else result:
        if x is not None:
            yield x


def run(call: Call, backend: str, seed: int, *, in_float32: bool) -> list[Tensor] | Exception:
    """Values, then gradients; or what was raised."""
    arguments = dict(call.arguments)
    for name in call.differentiable:
        if isinstance(x := arguments[name], Tensor):
            x = x.float() if in_float32 and x.dtype.itemsize == 2 and x.is_floating_point() else x
            arguments[name] = x.detach().requires_grad_() if x.is_floating_point() else x
    if call.takes_backend:
        arguments["backend"] = backend
    try:
        values = list(_tensors(call.function(**arguments)))
        g = torch.Generator().manual_seed(seed)
        weights = [torch.randn(x.shape, generator=g).to(x.dtype) for x in values]
        roots = [(x, w) for x, w in zip(values, weights, strict=True) if x.requires_grad]
        finite = [(torch.where(x.isfinite(), x, 0.0), w) for x, w in roots]
        inputs = [x for name in call.differentiable if isinstance(x := arguments[name], Tensor)
                  and x.requires_grad]  # fmt: skip
        if finite and inputs:
            total = torch.stack([(x.float() * w.float()).sum() for x, w in finite]).sum()
            if total.requires_grad:
                found = torch.autograd.grad(total, inputs, allow_unused=True)
                values += [x for x in found if x is not None]
        return [x.detach() for x in values]
    except Exception as error:
        return error


def check(plan: Plan) -> None:
    """Run a plan on both backends; AssertionError on a difference or an unclear refusal."""
    torch.set_num_threads(plan.threads)
    tolerance = DTYPES[plan.dtype][1]
    got = run(build(plan), "cpu", plan.seed, in_float32=False)
    if isinstance(got, Exception):
        assert plan.fault is not None, f"a valid call was refused: {got!r}"
        assert isinstance(got, REFUSALS) and str(got).startswith(SPEAKERS), repr(got)
        return
    call = build(plan)
    if not call.takes_backend:
        return  # a drop-in chooses the backend itself; other tests compare its values
    if plan.fault is not None and plan.fault[1] == "meta":
        return
    wanted = run(call, "reference", plan.seed, in_float32=plan.fault is None)
    assert not isinstance(wanted, Exception), f"only the CPU backend takes it: {wanted!r}"
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == b.shape
        if plan.fault is None:
            scale = (
                max(1.0, float(torch.where(b.isfinite(), b, 0.0).abs().max())) if b.numel() else 1
            )
            torch.testing.assert_close(
                a.double(), b.double(), rtol=0.0, atol=tolerance * scale, equal_nan=True
            )
