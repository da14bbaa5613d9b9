"""`capture_router` beside the models' own router logits: probabilities, gradients, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ral_kernels as rk
from ral_kernels.integrations.transformers import router_check
from tests.integrations import mixtures, models
from tests.integrations.eager_maps import assert_same_gradients, footprint, gradients, perturbed

B, T, E, K = 2, 9, mixtures.EXPERTS, mixtures.CHOSEN
LAYERS = {"qwen3_moe": [0, 2], "qwen3_vl_moe": [0, 2], "mixtral": [0, 1, 2]}


def tokens(rows: int = B, length: int = T, seed: int = 0) -> Tensor:
    return torch.randint(4, 290, (rows, length), generator=torch.Generator().manual_seed(seed))


def own_logits(model: Any, batch: dict[str, Tensor]) -> list[Tensor]:
    """[B, T, E] of each mixture, as the model returns them."""
    shape = batch["input_ids"].shape
    logits = model(**batch, output_router_logits=True, use_cache=False).router_logits
    return [each.view(*shape, -1) for each in logits]


@pytest.fixture(scope="module")
def model() -> Any:
    return mixtures.qwen3_moe()


@pytest.mark.parametrize("family", mixtures.FAMILIES)
def test_probabilities_are_the_models_own(family: str) -> None:
    model = mixtures.FAMILIES[family]()
    if family == "qwen3_vl_moe":  # with pictures, padded
        batch = models.inputs("qwen3_vl", images=True, padding="left")
    else:
        batch = {"input_ids": tokens(), "attention_mask": torch.ones(B, T).long()}
        batch["attention_mask"][0, :3] = 0
    before = footprint(model)
    with rk.capture_router(model, "all") as routed:
        plain = model(**batch, use_cache=False).logits
    assert routed.layers == LAYERS[family] and len(routed) == 1
    assert footprint(model) == before
    torch.testing.assert_close(model(**batch, use_cache=False).logits, plain, rtol=0, atol=0)
    length = batch["input_ids"].shape[1]
    for layer, wanted in zip(routed.layers, own_logits(model, batch), strict=True):
        assert torch.equal(routed.logits(layer), wanted)
        p = routed.policy(layer, rows=(2, length - 1))
        assert p.shape == (len(wanted), length - 3, E) and p.dtype == torch.float32
        assert torch.equal(p, wanted[:, 2:-1].softmax(-1))
        experts = routed.experts(layer)
        assert torch.equal(experts.sort().values, wanted.topk(K).indices.sort().values)
        # The shares of the chosen experts, which both families renormalise
        shares = wanted.softmax(-1).gather(-1, experts)
        kept = torch.zeros_like(wanted).scatter(-1, experts, shares / shares.sum(-1, keepdim=True))
        torch.testing.assert_close(routed.policy(layer, renormalised=True), kept)


def test_rows_layers_and_forwards(model: Any) -> None:
    with rk.capture_router(model, rows=slice(-4, None)) as routed:
        model(tokens())
        model(tokens(1, 5, seed=1))
    assert routed.layers == [2] and len(routed) == 2
    assert routed[0].policy().shape == (B, 4, E) and routed.policy().shape == (1, 4, E)
    assert torch.equal(routed.policy(-1), routed[1].policy(2))
    assert torch.equal(routed.policy(rows=(0, 5))[:, 1:], routed.policy())
    with routed:
        assert len(routed) == 0
        model(tokens())
        routed.clear()
        model(tokens())
        assert len(routed) == 1


def test_generation_has_a_forward_for_each_step(model: Any) -> None:
    with rk.capture_router(model, 0) as routed:
        model.generate(tokens(), max_new_tokens=3, do_sample=False)
    assert [each.policy().shape[1] for each in routed.forwards] == [T, 1, 1]


def test_load_counts_the_choices(model: Any) -> None:
    mask = torch.ones(B, 4).bool()
    mask[0, 1:] = False
    with rk.capture_router(model, 0, rows=(2, 6)) as routed:
        model(tokens())
    load = routed.load(mask=mask)
    wanted = torch.bincount(routed.experts()[mask].flatten(), minlength=E).float()
    assert torch.equal(load, wanted) and load.sum() == K * mask.sum()
    assert routed.load().sum() == K * mask.numel()
    with pytest.raises(ValueError, match=r"mask must be bool \[B, T\] = \(2, 4\); got float32"):
        routed.load(mask=mask.float())


def routed_loss(model: Any, batch: Tensor, reference: dict[int, Tensor], **options: Any) -> Tensor:
    """The term's form: the mean over layers of A · JSD, of the last five tokens."""
    with rk.capture_router(model, "all", rows=(4, T)) as routed:
        model(batch, use_cache=False)
    return torch.stack(
        [
            rk.policy_loss(
                routed.policy(layer, **options), reference[layer], torch.tensor([1.0, -0.5]),
                logits=False,
            )
            for layer in routed.layers
        ]
    ).mean()  # fmt: skip


@pytest.fixture(scope="module")
def stepped() -> tuple[Any, dict[int, Tensor], dict[str, Tensor]]:
    """A model after a step, the routing before it, and the loss's gradients by hand."""
    model = mixtures.qwen3_moe()
    with rk.capture_router(model, "all", rows=(4, T)) as routed, torch.no_grad():
        model(tokens())
    reference = {layer: routed.snapshot(layer) for layer in routed.layers}
    perturbed(model)
    losses = []
    for layer, logits in zip([0, 2], own_logits(model, {"input_ids": tokens()}), strict=True):
        p, r = logits[:, 4:].softmax(-1), reference[layer]
        m = (p + r) / 2
        jsd = ((p * (p / m).log()).sum(-1) + (r * (r / m).log()).sum(-1)) / 2
        losses.append((torch.tensor([1.0, -0.5])[:, None] * jsd).mean())
    return model, reference, gradients(model, torch.stack(losses).mean())


def test_gradients_reach_the_model(stepped: Any) -> None:
    """Against autograd through the logits that the model returns itself."""
    model, reference, wanted = stepped
    got = gradients(model, routed_loss(model, tokens(), reference))
    assert {"model.layers.0.mlp.gate.weight", "model.embed_tokens.weight"} <= got.keys()
    assert_same_gradients(got, wanted, 1e-5)


def test_nothing_at_the_reference(stepped: Any) -> None:
    """Exactly zero, in both variants, also of the gradient."""
    model, _, _ = stepped
    for renormalised in (False, True):
        with rk.capture_router(model, "all", rows=(4, T)) as routed, torch.no_grad():
            model(tokens(), use_cache=False)
        reference = {x: routed.snapshot(x, renormalised=renormalised) for x in routed.layers}
        assert not any(x.requires_grad for x in reference.values())
        loss = routed_loss(model, tokens(), reference, renormalised=renormalised)
        assert loss.item() == 0.0
        assert all((x == 0).all() for x in gradients(model, loss).values())


@pytest.mark.parametrize("backward", ["inside the with", "after it"])
def test_gradient_checkpointing(stepped: Any, backward: str) -> None:
    """The recomputation of a layer is not captured again, and the gradients are the same."""
    model, reference, wanted = stepped
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    try:
        if backward == "after it":
            got = gradients(model, routed_loss(model, tokens(), reference))
        else:
            with rk.capture_router(model, 0) as watching:
                got = gradients(model, routed_loss(model, tokens(), reference))
            assert len(watching) == 1
        assert_same_gradients(got, wanted, 1e-5)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        message = "capture_router: gradient checkpointing must not be reentrant; enable it with .*F"
        with pytest.raises(NotImplementedError, match=message), rk.capture_router(model):
            pass
        with torch.no_grad(), rk.capture_router(model) as routed:  # nothing to cut out
            model(tokens())
        assert len(routed) == 1
    finally:
        model.gradient_checkpointing_disable()
        model.eval()


def test_autocast(stepped: Any) -> None:
    """The softmax of bfloat16 logits is float32, and the gradient reaches the weights."""
    model, _, _ = stepped
    with torch.autocast("cpu", torch.bfloat16), rk.capture_router(model, "all") as routed:
        model(tokens())
    assert routed.logits(0).dtype == torch.bfloat16
    p = routed.policy(0)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p, routed.logits(0).float().softmax(-1), rtol=0, atol=0)
    p[0, 0, 0].backward()
    assert model.model.layers[0].mlp.gate.weight.grad.norm() > 0
    model.zero_grad()


def test_detached(model: Any) -> None:
    with rk.capture_router(model, detach=True) as routed:
        model(tokens())
    assert not routed.logits().requires_grad and not routed.policy().requires_grad


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("family", mixtures.REFUSED)
def test_what_is_no_distribution(family: str) -> None:
    """Whole models: some routers can be tried when the capture is made, others when they run."""
    reasons = {
        "DeepseekV3": "DeepseekV3TopkRouter weighs its experts by sigmoids",
        "Glm4Moe": "Glm4MoeTopkRouter weighs its experts by sigmoids",
        "Ernie4_5_Moe": "Ernie4_5_MoeTopKRouter does not choose the most probable experts: a bias",
        "Llama4": r"must return the logits .*; Llama4Router returns 2 values: \(64, 6\), \(64, 6\)",
        "Lfm2Moe": "Lfm2MoeTopKRouter weighs its experts by sigmoids",
    }
    model = mixtures.refused(family)
    with (
        pytest.raises(NotImplementedError, match=f"^capture_router: .*{reasons[family]}"),
        rk.capture_router(model, "all"),
    ):
        model(tokens())


class Router(nn.Module):
    """By a softmax, unless `rule` changes it."""

    def __init__(self, rule: Any, more: bool = False) -> None:
        super().__init__()
        self.rule, self.more = rule, more
        self.weight = nn.Parameter(torch.zeros(E, 16))
        self.bias_of_choice = nn.Buffer(torch.zeros(E))

    def forward(self, x: Tensor, *more: Tensor) -> Any:
        if self.more and not more:
            raise TypeError("one argument more")
        return self.rule(self, x @ self.weight.T)


def softmax(router: Router, logits: Tensor) -> Any:
    weights, experts = logits.softmax(-1).topk(K)
    return logits, weights, experts


def scaled(router: Router, logits: Tensor) -> Any:
    return (*softmax(router, logits)[:1], 2.5 * softmax(router, logits)[1], logits.topk(K).indices)


def one(router: Router, logits: Tensor) -> Any:
    weights, experts = logits.softmax(-1).topk(1)
    return logits, weights / weights.sum(-1, keepdim=True), experts


def sigmoid(router: Router, logits: Tensor) -> Any:
    weights, experts = logits.sigmoid().topk(K)
    return logits, weights / weights.sum(-1, keepdim=True), experts


def one_sigmoid(router: Router, logits: Tensor) -> Any:
    return logits, *logits.sigmoid().topk(1)


def biased(router: Router, logits: Tensor) -> Any:
    p = logits.softmax(-1)
    experts = (p + router.bias_of_choice).topk(K).indices
    return logits, p.gather(-1, experts), experts


def tempered(router: Router, logits: Tensor) -> Any:
    return logits, *(2 * logits).softmax(-1).topk(K)


def jittered(router: Router, logits: Tensor) -> Any:
    """In training, which a new module is in, it chooses by noise as well."""
    noise = torch.randn_like(logits) if router.training else 0.0
    return logits, *(logits + noise).softmax(-1).topk(K)


RULES = {
    softmax: None,
    jittered: None,
    scaled: None,
    one: None,
    sigmoid: "sigmoids, each of its own logit",
    one_sigmoid: "sigmoids, each of its own logit",
    biased: "does not choose the most probable experts",
    tempered: "does not weigh its experts by a softmax over its logits",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_routers_are_judged_by_what_they_compute(rule: Any) -> None:
    """All of one class, whose weights and bias are zero: nothing but a trial tells them apart."""
    router, reason = Router(rule), RULES[rule]
    if reason is None:
        router_check.check_router("op", router, 16)
        assert router in router_check._passed and router.training
        return
    with pytest.raises(NotImplementedError, match=f"^op: .*; Router .*{reason}"):
        router_check.check_router("op", router, 16)


def test_a_router_that_cannot_be_tried() -> None:
    """It is judged by its first call."""
    for rule in (softmax, sigmoid):
        router = Router(rule, more=True)
        router_check.check_router("op", router, 16)
        assert router not in router_check._passed
        logits = torch.randn(50, E, generator=torch.Generator().manual_seed(0))
        routing = router_check.routing_of("op", router, rule(router, logits))
        if rule is softmax:
            router_check.check_call("op", router, routing)
            assert router in router_check._passed
        else:
            with pytest.raises(NotImplementedError, match="sigmoids"):
                router_check.check_call("op", router, routing)


def test_bad_arguments(model: Any) -> None:
    def refused(error: type[Exception], match: str, *args: Any, **given: Any) -> None:
        with pytest.raises(error, match=f"^capture_router: {match}"):
            rk.capture_router(*(args or (model,)), **given)

    refused(NotImplementedError, "layers must .* which are 0, 2 of this model; got 1", layers=1)
    refused(ValueError, r"layers must lie in \[-3, 3\); got 3", layers=3)
    refused(TypeError, "layers must be an int, .*; got 'none'", layers="none")
    refused(TypeError, "detach must be True or False; got 1", detach=1)
    refused(TypeError, "model must be a transformers model .*; got int", 3)
    dense = models.build("llama")
    refused(NotImplementedError, "model must have blocks of .*; found none in LlamaModel", dense)
    compiled = torch.compile(models.build("llama"), backend="eager")
    refused(NotImplementedError, "model must not be compiled; got one under torch", compiled)
    in_place = mixtures.qwen3_moe()
    in_place.model.layers[2].compile(backend="eager")
    refused(NotImplementedError, "model must not be compiled; got one under torch", in_place)
    routed = rk.capture_router(model, "all")
    with pytest.raises(
        RuntimeError, match=r"^capture_router: a forward must run inside the `with`"
    ):
        routed.policy(0)
    with routed:
        with pytest.raises(RuntimeError, match="this capture is open already"):
            routed.__enter__()
        model(tokens())
    for error, match, layer in (
        (ValueError, "layer must be one of 0, 2; got None", None),
        (ValueError, "layer must be one of 0, 2; got 1", 1),
        (TypeError, "layer must be None or an int; got '0'", "0"),
    ):
        with pytest.raises(error, match=f"^capture_router: {match}"):
            routed.policy(layer)  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"^capture_router: rows must satisfy .* <= T=9; got 0, 10"
    ):
        routed.policy(0, rows=(0, T + 1))


def test_an_interrupted_forward(model: Any) -> None:
    with rk.capture_router(model, "all") as routed:

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        handle = model.model.layers[1].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            model(tokens())
        handle.remove()
        with pytest.raises(RuntimeError, match=r"^capture_router: every forward must run through"):
            routed.policy(0)
        routed.clear()
        model(tokens())
        assert routed.policy(0).shape == (B, T, E)
