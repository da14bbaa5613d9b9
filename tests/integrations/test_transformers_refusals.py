"""What attn_implementation="ral" refuses, by name, and how it gets known to transformers."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ral_kernels.integrations.transformers import register, registration
from ral_kernels.integrations.transformers.attention import attention_forward
from ral_kernels.integrations.transformers.capture import capture
from tests.integrations import models


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    register()
    yield


def tiny(batch_size: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.zeros(batch_size, heads, 3, 8) for heads in (4, 2, 2))
    return query, key, value


class Tagged(Tensor):
    """A subclass: what its memory means, only it knows."""


class SomeAttention(torch.nn.Module):
    layer_idx = 3


def test_dropout_in_training_is_refused() -> None:
    model = models.build("llama", "ral", attention_dropout=0.1)
    batch = models.inputs("llama")
    model(**batch)  # no dropout in eval mode
    model.train()
    with pytest.raises(NotImplementedError, match=r"LlamaAttention, layer 0: dropout .* got 0\.1"):
        model(**batch)


def test_attention_sinks_are_refused() -> None:
    from transformers import GptOssConfig, GptOssForCausalLM

    options = {**models.TEXT, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}
    model: Any = GptOssForCausalLM._from_config(GptOssConfig(**options), attn_implementation="ral")
    with pytest.raises(NotImplementedError, match="GptOssAttention, layer 0: attention sinks"):
        model(**models.inputs("llama"))


def test_position_bias_is_refused() -> None:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    model: Any = T5EncoderModel._from_config(config, attn_implementation="ral").eval()
    with pytest.raises(
        NotImplementedError, match=r"T5Attention.*a position bias \(position_bias\)"
    ):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_models_with_attention_of_their_own_are_refused() -> None:
    """They add a dense mask to scores. Without one, Bloom saw the tokens after each."""
    from transformers import BlipTextConfig, BlipTextModel, BloomConfig, BloomForCausalLM

    bloom = BloomConfig(vocab_size=32, hidden_size=16, n_layer=1, n_head=2)
    blip = BlipTextConfig(
        vocab_size=32, hidden_size=16, encoder_hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2,
    )  # fmt: skip
    for config, cls, own in (
        (bloom, BloomForCausalLM, "BloomAttention"),
        (blip, BlipTextModel, "BlipTextSelfAttention"),
    ):
        model: Any = cls._from_config(config, attn_implementation="ral")
        with pytest.raises(NotImplementedError, match=f"^ral attention: {own} is not supported"):
            model(input_ids=torch.ones(1, 4, dtype=torch.long))


@pytest.mark.parametrize(
    ("keyword", "what"),
    [
        ("s_aux", "attention sinks"),
        ("position_bias", "a position bias"),
        ("indices", "sparse attention by indices"),
        ("cache", "a paged cache"),
        ("block_table", "a paged cache"),
    ],
)
def test_keywords_that_are_refused(keyword: str, what: str) -> None:
    with pytest.raises(NotImplementedError, match=rf"SomeAttention, layer 3: {what} \({keyword}\)"):
        attention_forward(SomeAttention(), *tiny(), None, **{keyword: torch.zeros(1)})
    attention_forward(SomeAttention(), *tiny(), None, **{keyword: None})


class NewAttention(SomeAttention):
    """A module whose attention takes what no other one does."""

    def forward(self, attend: Any, **keywords: Any) -> Any:
        return attend(self, *tiny(), None, scaling=0.5, new_bias=1, **keywords)


def test_keywords_that_attention_reads_are_refused() -> None:
    """What a module names in its call. What only passes through, such as labels, is ignored."""
    with pytest.raises(
        NotImplementedError,
        match=r"NewAttention, layer 3: new_bias, which its attention reads, is not .*; got int",
    ):
        NewAttention()(attention_forward)
    attention_forward(NewAttention(), *tiny(), None, new_bias=None, labels=torch.ones(1, 3))
    out, _ = attention_forward(SomeAttention(), *tiny(), None, new_bias=1, position_ids=1)
    assert torch.equal(out, attention_forward(SomeAttention(), *tiny(), None)[0])


FAMILIES_WITH_LABELS = (*models.FAMILIES, "gemma4")


@pytest.mark.parametrize("family", FAMILIES_WITH_LABELS)
def test_labels_pass_through(family: str) -> None:
    """The base classes hand the labels of the whole model down to attention."""
    base = tiny_gemma4 if family == "gemma4" else functools.partial(models.build, family)
    batch = models.inputs("llama" if family == "gemma4" else family)
    given = {**batch, "labels": batch["input_ids"], "a_keyword_of_a_later_version": True}
    with torch.no_grad():
        wanted = base("sdpa")(**batch, labels=batch["input_ids"])
        got = base("ral")(**given)
    torch.testing.assert_close(got.loss, wanted.loss)
    torch.testing.assert_close(got.logits, wanted.logits, rtol=1e-4, atol=1e-4)


def tiny_gemma4(implementation: str) -> Any:
    from transformers import Gemma4Config, Gemma4ForConditionalGeneration

    sizes = {**models.TEXT, "head_dim": 16, "global_head_dim": 16}
    sizes["vocab_size_per_layer_input"] = models.VOCABULARY
    config = Gemma4Config(text_config=sizes, vision_config=None, audio_config=None)
    torch.manual_seed(0)
    made: Any = Gemma4ForConditionalGeneration._from_config(
        config, attn_implementation=implementation
    )
    return made.eval()


def test_labels_with_capture_and_in_a_compiled_model() -> None:
    """Which keywords are read is found while the graph is traced."""
    model = models.build("llama", "ral", num_hidden_layers=1)
    with capture(model) as captured:
        model(**models.inputs("llama"), labels=models.inputs("llama")["input_ids"])
    torch.testing.assert_close(captured.policy()[:, 1:].sum(-1), torch.ones(2, 6))
    batch = {"input_ids": models.inputs("llama")["input_ids"]}
    compiled: Any = torch.compile(model.model, backend="eager", fullgraph=True)
    with torch.no_grad():
        wanted = model.model(**batch, use_cache=False).last_hidden_state
        got = compiled(**batch, use_cache=False, labels=batch["input_ids"]).last_hidden_state
    torch.testing.assert_close(got, wanted)
    torch._dynamo.reset()


def test_sinks_that_are_not_passed_are_refused() -> None:
    module = SomeAttention()
    module.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(NotImplementedError, match=r"attention sinks \(module.sinks\)"):
        attention_forward(module, *tiny(), None)


def test_output_attentions_is_refused() -> None:
    model = models.build("llama", "ral")
    with pytest.raises(NotImplementedError, match="output_attentions=True is not supported"):
        model(**models.inputs("llama"), output_attentions=True)
    model(**models.inputs("llama"), output_attentions=False)


@pytest.mark.parametrize(
    ("mask", "error", "match"),
    [
        (torch.ones(3, dtype=torch.long), TypeError, "packed sequences go by cu_seq_lens_q"),
        (torch.ones(1, 3, 3, dtype=torch.bool), TypeError, r"\(1, 3, 3\).* go by cu_seq_lens_q"),
        (torch.ones(1, 3).as_subclass(Tagged), TypeError, "got Tagged, a subclass of Tensor"),
        (torch.zeros(1, 3), TypeError, r"bool or integer \[B, N\].* got torch.float32 \(1, 3\)"),
        (torch.ones(3, dtype=torch.bool), TypeError, r"got torch.bool \(3,\)"),
        (torch.ones(1, 4, dtype=torch.bool), ValueError, r"N <= 3 keys; got \(1, 4\)"),
        (torch.ones(1, 1, 3, 3, dtype=torch.long), TypeError, "must be bool .* got torch.int64"),
    ],
)
def test_masks_that_are_refused(mask: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=f"SomeAttention, layer 3: .*{match}"):
        attention_forward(SomeAttention(), *tiny(), mask)


@pytest.mark.parametrize("dimensions", [1, 3])
def test_masks_of_packed_batches_are_told_what_to_use(dimensions: int) -> None:
    model, ids = models.build("llama", "ral"), models.inputs("llama")["input_ids"]
    shape = ids.shape[1:] if dimensions == 1 else (*ids.shape, ids.shape[1])
    with pytest.raises(TypeError, match=r"attention_mask must be \[B, N\].*go by cu_seq_lens_q"):
        model(input_ids=ids, attention_mask=torch.ones(shape, dtype=torch.long))


def test_windows_that_are_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window must be None or >= 1; got 0"):
        attention_forward(SomeAttention(), *tiny(), None, sliding_window=0)
    mask = torch.ones(1, 3, dtype=torch.int16)  # a causal window
    with pytest.raises(NotImplementedError, match=r"neither the call nor module\.config says"):
        attention_forward(SomeAttention(), *tiny(), mask)


IMPORT_OURS = "import ral_kernels\n"
IMPORT_THEIRS = "from transformers import LlamaConfig, LlamaForCausalLM\n"
USE = """
import torch, sys
config = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                     num_attention_heads=2)
model = LlamaForCausalLM._from_config(config, attn_implementation="ral")
assert model.config._attn_implementation == "ral"
ids = torch.ones(2, 3, dtype=torch.long)
mask = torch.tensor([[0, 0, 1], [1, 1, 1]])
wanted = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
wanted.load_state_dict(model.state_dict())
got, wanted = (m(ids, attention_mask=mask).logits[mask.bool()] for m in (model, wanted))
torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
assert not any(type(finder).__name__ == "_Finder" for finder in sys.meta_path)
print("fine")
"""


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# Each is a process of its own that imports transformers.
slow_import = pytest.mark.slow(stands_in="test_registration_by_import_alone")


@pytest.mark.parametrize(
    "imports",
    [
        IMPORT_OURS + "import sys; assert 'transformers' not in sys.modules\n" + IMPORT_THEIRS,
        pytest.param(IMPORT_THEIRS + IMPORT_OURS, marks=slow_import),
        pytest.param(
            "import transformers\n" + IMPORT_OURS + IMPORT_THEIRS,
            marks=slow_import,
        ),
    ],
    ids=["ours_first", "theirs_first", "lazy_theirs_first"],
)
def test_registration_by_import_alone(imports: str) -> None:
    assert "fine" in run(imports + USE)


def test_a_version_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    monkeypatch.setattr(transformers, "__version__", "4.40.1")
    with pytest.raises(ImportError, match=r"register: transformers >= [\d.]+ must .* got 4\.40\.1"):
        register()
    from ral_kernels.integrations import _autoregister

    with pytest.warns(UserWarning, match='attn_implementation="ral" is not available: .*4.40.1'):
        _autoregister.install()  # somebody's import of transformers must not fail for it


def test_transformers_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        ImportError, match=r"capture: transformers >= .*pip install 'transformers>="
    ):
        registration.check_transformers("capture")
