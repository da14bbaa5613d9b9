"""`capture` in training: checkpointing, LoRA, autocast, torch.compile, DDP and FSDP2."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.spawn import spawn

import ral_kernels as rk
from ral_kernels.integrations.transformers import register
from ral_kernels.integrations.transformers.capture import capture
from tests.integrations import two_processes
from tests.integrations.eager_maps import (
    assert_same_gradients,
    gradients,
    leaves_nothing,
    perturbed,
)
from tests.integrations.models import build, inputs

ROWS = slice(-5, None)
ADVANTAGES = torch.tensor([1.3, -0.7])


@pytest.fixture(autouse=True, scope="module")
def implementations():
    register()


def _snapshot(family: str, batch: dict[str, Tensor]) -> rk.AttentionSnapshot:
    old = perturbed(build(family, "sdpa"))
    with torch.no_grad(), capture(old, rows=ROWS) as captured:
        old(**batch, use_cache=False)
    return captured.snapshot()


def _loss(
    model: Any, batch: dict[str, Tensor], snapshot: rk.AttentionSnapshot, layers: Any = -1
) -> Tensor:
    """A token loss and the RAL loss of the last captured layer."""
    with capture(model, layers, rows=ROWS) as captured:
        logits = model(**batch, use_cache=False).logits
    # The backward comes after the end of the `with`: what is recomputed then is no longer tapped.
    ral = captured.ral_loss(snapshot, ADVANTAGES, layer=captured.layers[-1])
    return logits.logsumexp(-1).mean() + 10 * ral


@pytest.fixture(scope="module")
def plain():
    """Batch, reference, and the gradients without anything special."""
    batch = inputs("qwen2_5_vl")
    snapshot = _snapshot("qwen2_5_vl", batch)
    model = build("qwen2_5_vl", "sdpa").train()
    wanted = gradients(model, _loss(model, batch, snapshot))
    without = build("qwen2_5_vl", "sdpa")
    bare = gradients(without, without(**batch, use_cache=False).logits.logsumexp(-1).mean())
    key = "model.language_model.layers.1.self_attn.q_proj.weight"
    assert (wanted[key] - bare[key]).norm() > 0.1 * bare[key].norm()  # the RAL loss is in there
    return batch, snapshot, wanted


def test_a_question_without_gradients_does_not_cut_the_next_one_off(plain):
    batch, snapshot, wanted = plain
    model = build("qwen2_5_vl", "sdpa").train()
    with capture(model, rows=ROWS) as captured:
        logits = model(**batch, use_cache=False).logits
    with torch.no_grad():
        captured.policy()
    ral = captured.ral_loss(snapshot, ADVANTAGES)
    got = gradients(model, logits.logsumexp(-1).mean() + 10 * ral)
    assert_same_gradients(got, wanted)


@pytest.mark.parametrize("layers", [-1, "all"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(plain, reentrant, layers):
    batch, snapshot, wanted = plain
    model = build("qwen2_5_vl", "sdpa").train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    first, last = model.model.language_model.layers
    recomputed = []
    first.self_attn.q_proj.register_forward_pre_hook(lambda *_: recomputed.append("first"))
    last.self_attn.q_proj.register_forward_pre_hook(lambda *_: recomputed.append("last"))
    with leaves_nothing(model):
        loss = _loss(model, batch, snapshot, layers)
    assert last.gradient_checkpointing and first.gradient_checkpointing
    assert_same_gradients(gradients(model, loss), wanted)
    # The other layer is still checkpointed: it ran again in the backward.
    assert recomputed.count("last") == 1
    assert recomputed.count("first") == (1 if layers == "all" else 2)


@pytest.mark.parametrize("implementation", ["REENTRANT", "NO_REENTRANT"])
def test_checkpoint_wrappers_of_torch(plain, implementation):
    """What accelerate puts around layers for FSDP's activation checkpointing."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
        CheckpointImpl,
        checkpoint_wrapper,
    )

    batch, snapshot, wanted = plain
    model = build("qwen2_5_vl", "sdpa").train()
    model.enable_input_require_grads()
    layers = model.model.language_model.layers
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer, CheckpointImpl[implementation])
    functions = [layer.checkpoint_fn for layer in layers]
    with leaves_nothing(model):
        loss = _loss(model, batch, snapshot)
    assert [layer.checkpoint_fn for layer in layers] == functions
    got = {name.replace("_checkpoint_wrapped_module.", ""): grad
           for name, grad in gradients(model, loss).items()}  # fmt: skip
    assert_same_gradients(got, wanted)


def test_lora(plain):
    import peft

    batch, snapshot, _ = plain
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "k_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(build("qwen2_5_vl", "sdpa"), config).train()
    with leaves_nothing(model), capture(model, rows=ROWS) as captured:
        model(**batch, use_cache=False)
    ral = captured.ral_loss(snapshot, ADVANTAGES)
    got = gradients(model, ral)
    assert got and all("lora" in name for name in got)
    # The same numbers with the adapters merged into the weights
    merged = model.merge_and_unload()
    with capture(merged, rows=ROWS) as captured:
        merged(**batch, use_cache=False)
    torch.testing.assert_close(captured.ral_loss(snapshot, ADVANTAGES), ral, atol=1e-6, rtol=1e-5)


def test_autocast_captures_what_attention_is_given(plain):
    batch, _, _ = plain
    model = build("qwen2_5_vl", "sdpa")
    with torch.autocast("cpu", torch.bfloat16), capture(model, rows=ROWS) as captured:
        logits = model(**batch, use_cache=False).logits
        inside, snapshot = captured.policy(), captured.snapshot()
    # In the dtype of the attention, whether asked about inside of autocast or outside
    assert captured.q().dtype == captured.k().dtype == snapshot.dtype == torch.bfloat16
    assert torch.equal(captured.policy(), inside)
    assert captured.ral_loss(snapshot, ADVANTAGES).item() == 0.0
    eager = build("qwen2_5_vl", "eager")
    with torch.autocast("cpu", torch.bfloat16):
        maps = eager(**batch, output_attentions=True, use_cache=False).attentions[-1].float()
    from tests.integrations.eager_maps import eager_policy

    torch.testing.assert_close(inside, eager_policy(maps)[:, ROWS], atol=0.01, rtol=0.05)
    loss = logits.float().logsumexp(-1).mean() + inside.square().sum()
    found = gradients(model, loss)
    assert all(torch.isfinite(x).all() for x in found.values())


slow_compile = pytest.mark.slow(stands_in="test_compile_makes_one_graph_and_not_again")


@pytest.mark.parametrize(
    "implementation",
    [pytest.param("sdpa", marks=slow_compile), pytest.param("eager", marks=slow_compile), "ral"],
)
def test_compile_makes_one_graph_and_not_again(implementation):
    import torch._dynamo
    from torch._dynamo.testing import CompileCounterWithBackend

    batch = {"input_ids": inputs("qwen2")["input_ids"]}
    model = build("qwen2", implementation)
    with capture(model, rows=ROWS) as captured:
        model(**batch, use_cache=False)
    wanted, reference = captured.policy(), captured.snapshot()
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    compiled(**batch, use_cache=False)
    assert counter.frame_count == 1
    for _ in range(3):
        with capture(compiled, rows=ROWS) as captured:
            for _ in range(3):
                compiled(**batch, use_cache=False)
        compiled(**batch, use_cache=False)  # closed again
    # One graph for the first call in a capture and one for those behind it; no more, ever
    assert counter.frame_count == 3
    assert len(captured) == 3
    for forward in captured.forwards:
        torch.testing.assert_close(forward.policy(), wanted, atol=1e-6, rtol=1e-5)
    old = perturbed(build("qwen2", implementation))
    with capture(old, rows=ROWS) as other:
        old(**batch, use_cache=False)
    plain = capture(model, rows=ROWS)
    with plain:
        model(**batch, use_cache=False)
    got = gradients(model, captured.ral_loss(other.snapshot(), ADVANTAGES))
    assert_same_gradients(got, gradients(model, plain.ral_loss(other.snapshot(), ADVANTAGES)))
    assert reference.q.shape == captured.q()[:, :, ROWS].shape
    torch._dynamo.reset()


@slow_compile
def test_compiled_layers_and_compiled_in_place(plain):
    batch, snapshot, wanted = plain
    for whole in (True, False):
        torch._dynamo.reset()
        model = build("qwen2_5_vl", "sdpa").train()
        layers = model.model.language_model.layers
        if whole:
            model.model.language_model.compile(backend="aot_eager")
        else:
            for index, layer in enumerate(layers):
                layers[index] = torch.compile(layer, backend="aot_eager")
        got = gradients(model, _loss(model, batch, snapshot))
        assert_same_gradients(
            {name.replace("_orig_mod.", ""): grad for name, grad in got.items()}, wanted
        )
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def distributed(tmp_path_factory):
    """Gradients of two processes, by how they were set up; one start for all, it is slow."""
    batch = inputs("qwen2_5_vl")
    snapshot = _snapshot("qwen2_5_vl", batch)
    folder = tmp_path_factory.mktemp("two_processes")
    torch.save({"batch": batch, "advantages": ADVANTAGES, "rows": (15, 20)}, folder / "in.pt")
    snapshot.save(folder / "snapshot.safetensors")
    spawn(two_processes.main, (str(folder),), nprocs=2)
    return torch.load(folder / "out.pt")


slow_processes = pytest.mark.slow(
    stands_in="tests/trainer/test_two_processes.py::test_two_processes_train_as_one"
)


@slow_processes
@pytest.mark.xdist_group("capture in two processes")
@pytest.mark.parametrize("how", two_processes.SETUPS)
def test_two_processes_have_the_gradients_of_one(plain, distributed, how):
    _, _, wanted = plain
    assert_same_gradients(distributed[how], wanted)


@slow_processes
@pytest.mark.xdist_group("capture in two processes")
def test_fsdp2_needs_a_loss_that_touches_the_output(distributed):
    """Documented in `capture`; if this fails, FSDP2 has learned it and the note can go."""
    assert "storage" in distributed["fsdp2 without logits"]
