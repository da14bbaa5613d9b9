"""The language model of Qwen2.5-VL in plain PyTorch, where the rollouts of a prompt share its keys.

The study's models are tiny, so that a forward of transformers is mostly Python. Each of the 8
rollouts of a prompt computes the prompt again there. Here a prompt without its last token runs once
(`Decoder.prefix`). The rows of each rollout attend to its keys and to their own: the same
function, and the same gradients. The last layer of a prefix is its keys and values alone.

`ral_kernels` captures and steers these layers as those of transformers: attention of a rollout's
rows goes through transformers' attention interface, in one call for each layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import ral_kernels as rk

NAME = "study"  # of `attend`, in transformers' attention interface
_NEVER = -1e30  # finite: a row of padding that sees nothing is not NaN
_FEW = 32  # rows for which the whole matrix of scores is faster; below 1 ms for 64 rollouts
_PREFIX = "model.language_model."
_FUSED = {  # one product in the place of several: by its name, their names in transformers
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


class Tokens(NamedTuple):
    """B sequences of T tokens, as `Decoder.forward` takes them.

    Attributes:
        input_ids: int64 [B, T].
        mask: bool [B, T], False for padding.
        rope: cos and sin, [B, 1, T, head dim] each, of `Decoder.rope`.
        visual: bool [B, T], the tokens of pictures; None for text alone.
        features: [B, T, hidden size], what stands there in the place of embeddings.
    """

    input_ids: Tensor
    mask: Tensor
    rope: tuple[Tensor, Tensor]
    visual: Tensor | None = None
    features: Tensor | None = None

    def columns(self, start: int | None, stop: int | None) -> Tokens:
        """Some of the T tokens."""
        at = slice(start, stop)
        return Tokens(
            self.input_ids[:, at],
            self.mask[:, at],
            (self.rope[0][:, :, at], self.rope[1][:, :, at]),
            None if self.visual is None else self.visual[:, at],
            None if self.features is None else self.features[:, at],
        )

    def rows(self, index: Tensor) -> Tokens:
        """Some of the B sequences, each as often as `index` has it."""
        return Tokens(
            self.input_ids[index],
            self.mask[index],
            (self.rope[0][index], self.rope[1][index]),
            None if self.visual is None else self.visual[index],
            None if self.features is None else self.features[index],
        )

    def then(self, text: Tokens) -> Tokens:
        """These sequences, each followed by text."""
        visual, features = self.visual, self.features
        if visual is not None and features is not None:
            visual = functional.pad(visual, (0, text.mask.shape[1]))
            features = functional.pad(features, (0, 0, 0, text.mask.shape[1]))
        return Tokens(
            torch.cat([self.input_ids, text.input_ids], 1),
            torch.cat([self.mask, text.mask], 1),
            (torch.cat([self.rope[0], text.rope[0]], 2),
             torch.cat([self.rope[1], text.rope[1]], 2)),
            visual,
            features,
        )  # fmt: skip


class Past:
    """Keys and values before a forward's tokens: of each layer [B, Hk, N, head dim] twice.

    Args:
        mask: bool [B, N], False for padding.
        layers: (k, v) of each.
    """

    def __init__(self, mask: Tensor, layers: list[tuple[Tensor, Tensor]]) -> None:
        self.mask, self.layers = mask, layers

    def rows(self, index: Tensor) -> Past:
        """Those of some sequences; the gradients of all that share one are added."""
        # index_select: its backward is 3x faster than that of an index
        of = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.layers]
        return Past(self.mask[index], of)

    def begin(self, mask: Tensor) -> Tensor:
        """The mask of all keys, those of a forward's tokens with `mask` included."""
        return torch.cat([self.mask, mask], 1)

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, with those of a forward's tokens after them."""
        before = self.layers[layer]
        return torch.cat([before[0], k], 2), torch.cat([before[1], v], 2)


class Cache(Past):
    """A past of fixed room, which forwards without gradients fill.

    Args:
        past: what is there; None for nothing.
        shape: (layers, B, Hk, head dim) of keys.
        room: how many keys fit.
    """

    def __init__(self, past: Past | None, shape: tuple[int, int, int, int], room: int) -> None:
        count, batch_size, heads, head_dim = shape
        self.length = 0 if past is None else past.mask.shape[1]
        super().__init__(
            torch.zeros(batch_size, room, dtype=torch.bool),
            [(torch.empty(batch_size, heads, room, head_dim),
              torch.empty(batch_size, heads, room, head_dim)) for _ in range(count)],
        )  # fmt: skip
        if past is not None:
            self.mask[:, : self.length] = past.mask
            for mine, given in zip(self.layers, past.layers, strict=True):
                mine[0][:, :, : self.length], mine[1][:, :, : self.length] = given

    def begin(self, mask: Tensor) -> Tensor:
        self._at, self.length = self.length, self.length + mask.shape[1]
        self.mask[:, self._at : self.length] = mask
        return self.mask[:, : self.length]

    def add(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        mine = self.layers[layer]
        mine[0][:, :, self._at : self.length], mine[1][:, :, self._at : self.length] = k, v
        return mine[0][:, :, : self.length], mine[1][:, :, : self.length]


@dataclass(frozen=True)
class Output:
    """[B, T, hidden size] after the last norm, which `Decoder.lm_head` turns into logits."""

    last_hidden_state: Tensor


def attend(
    module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention whose last query is at the last key, as an attention function.

    Args:
        module: not used.
        q: [B, H, T, D].
        k, v: [B, Hk, N, D].
        mask: bool [B, N], False for padding.
        scaling: factor on the scores.

    Returns:
        ([B, T, H, D], None).
    """
    batch_size, heads, seqlen_q, head_dim = q.shape
    num_kv_heads, seqlen_k = k.shape[1:3]
    if seqlen_q > _FEW:
        out = rk.attention(q, k, v, is_causal=True, key_padding_mask=mask, scale=scaling).out
        return out.transpose(1, 2), None
    seen = mask[:, None]
    if seqlen_q > 1:
        seen = seen & torch.ones(seqlen_q, seqlen_k, dtype=torch.bool).tril(seqlen_k - seqlen_q)
    bias = torch.where(seen, 0.0, _NEVER)[:, None]
    q = (q * scaling).reshape(batch_size, num_kv_heads, -1, head_dim)
    scores = (q @ k.transpose(-1, -2)).view(batch_size, heads, seqlen_q, seqlen_k) + bias
    p = scores.softmax(-1).view(batch_size, num_kv_heads, -1, seqlen_k)
    return (p @ v).view(batch_size, heads, seqlen_q, head_dim).transpose(1, 2), None


AttentionInterface.register(NAME, attend)


class Decoder(PreTrainedModel):
    """The language model of a Qwen2.5-VL, in float32.

    Args:
        config: of the whole model, as its checkpoint has it.
    """

    def __init__(self, config: Any) -> None:
        text = config.get_text_config()
        config._attn_implementation_internal = text._attn_implementation_internal = NAME
        super().__init__(config)
        hidden = text.hidden_size
        self.embed_tokens = nn.Embedding(text.vocab_size, hidden)
        self.layers = nn.ModuleList(_Layer(text, i) for i in range(text.num_hidden_layers))
        self.norm = nn.RMSNorm(hidden, text.rms_norm_eps)
        self.lm_head = nn.Linear(hidden, text.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        head_dim = hidden // text.num_attention_heads
        self._shape = (text.num_hidden_layers, text.num_key_value_heads, head_dim)
        power = torch.arange(0, head_dim, 2, dtype=torch.float) / head_dim
        self._frequencies = 1.0 / text.rope_parameters["rope_theta"] ** power
        sections = text.rope_parameters["mrope_section"]
        axes = torch.arange(len(sections)).repeat_interleave(torch.tensor(sections)) % 3
        self._axes = axes  # of each frequency: time, height or width

    @classmethod
    def of(cls, model: Any) -> Decoder:
        """The one of a `Qwen2_5_VLForConditionalGeneration`, with a copy of its weights."""
        made = cls(copy.deepcopy(model.config))
        made.load_weights(model.state_dict())
        made.train(model.training)
        return made

    def load_weights(self, named: Mapping[str, Tensor]) -> None:
        """Take weights by their names in transformers; those of other parts are not read."""
        mine = {}
        for name, parameter in self.named_parameters():
            found = [named[theirs] for theirs in _names(name)]
            mine[name] = torch.cat(found) if len(found) > 1 else found[0]
            assert mine[name].shape == parameter.shape
        self.load_state_dict(mine, strict=False)

    def weights(self, of: Callable[[Tensor], Tensor] = torch.detach) -> dict[str, Tensor]:
        """Weights by their names in transformers.

        Args:
            of: what is given of each; for example its gradient.
        """
        text = self.config.get_text_config()
        _, kv_heads, head_dim = self._shape
        sizes = {
            "qkv_proj": [text.hidden_size, kv_heads * head_dim, kv_heads * head_dim],
            "gate_up_proj": [text.intermediate_size] * 2,
        }
        found: dict[str, Tensor] = {}
        for name, parameter in self.named_parameters():
            names = _names(name)
            value = of(parameter)
            parts = value.split(sizes[name.split(".")[-2]]) if len(names) > 1 else [value]
            found.update(zip(names, parts, strict=True))
        return found

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    @torch.no_grad()
    def rope(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of M-RoPE, [B, 1, T, head dim] each.

        Args:
            positions: int64 [3, B, T], time, height and width; or [B, T], of text.
        """
        if positions.dim() == 2:
            angles = positions[..., None].float() * self._frequencies
        else:
            angles = positions.permute(1, 2, 0)[..., self._axes].float() * self._frequencies
        sin = angles.sin()
        cos = angles.cos()
        # The second half of a head takes +sin of the first, the first −sin of the second.
        return torch.cat([cos, cos], -1)[:, None], torch.cat([-sin, sin], -1)[:, None]

    def text(self, ids: Tensor, mask: Tensor, positions: Tensor) -> Tokens:
        """Tokens of text: all int64 or bool [B, T]."""
        return Tokens(ids, mask, self.rope(positions))

    def forward(
        self,
        input_ids: Tensor,
        *,
        mask: Tensor,
        rope: tuple[Tensor, Tensor],
        visual: Tensor | None = None,
        features: Tensor | None = None,
        past: Past | None = None,
    ) -> Output:
        """Hidden states of the tokens of `Tokens`, after the tokens of `past`.

        Captures and steers see one call of each layer: its queries are those of the T tokens, its
        keys those of `past`, too.
        """
        x = self._embed(input_ids, visual, features)
        seen = mask if past is None else past.begin(mask)
        for layer in self.layers:
            x = layer(x, rope, seen, past)
        return Output(self.norm(x))

    def prefix(self, tokens: Tokens) -> Past:
        """The past that prompts without their last token are for what follows."""
        x = self._embed(tokens.input_ids, tokens.visual, tokens.features)
        found = []
        *most, last = cast("list[_Layer]", list(self.layers))
        for layer in most:
            attention = layer.self_attn
            q, k, v = attention.project(layer.input_layernorm(x), tokens.rope)
            found.append((k, v))
            out, _ = attend(attention, q, k, v, tokens.mask, attention.scaling)
            x = layer.rest(x + attention.o_proj(out.flatten(2)))
        _, k, v = last.self_attn.project(last.input_layernorm(x), tokens.rope, queries=False)
        return Past(tokens.mask, [*found, (k, v)])

    @torch.no_grad()
    def generate(
        self,
        tokens: Tokens,
        past: Past | None,
        start: Tensor,
        choose: Callable[[Tensor], Tensor],
        *,
        longest: int,
        end: int,
        pad: int,
    ) -> Tensor:
        """Responses, up to and with `end`, and then `pad`: int64 [B, C], C <= longest.

        Args:
            tokens: of the B prompts, those after `past`, one or more.
            past: of the B prompts.
            start: int64 [B], the position of a response's first token.
            choose: from logits [B, vocabulary] to tokens [B].
            longest: how many tokens at most.
            end, pad: tokens.
        """
        batch_size, width = tokens.mask.shape
        width += 0 if past is None else past.mask.shape[1]
        count, heads, head_dim = self._shape
        cache = Cache(past, (count, batch_size, heads, head_dim), width + longest - 1)
        done = torch.zeros(batch_size, dtype=torch.bool)
        real = torch.ones(batch_size, 1, dtype=torch.bool)
        written: list[Tensor] = []
        while True:
            hidden = self(**tokens._asdict(), past=cache).last_hidden_state[:, -1]
            chosen = torch.where(done, pad, choose(self.lm_head(hidden)))
            written.append(chosen)
            done |= chosen == end
            if len(written) == longest or bool(done.all()):
                return torch.stack(written, 1)
            tokens = self.text(chosen[:, None], real, (start + len(written) - 1)[:, None])

    def _embed(self, ids: Tensor, visual: Tensor | None, features: Tensor | None) -> Tensor:
        x: Tensor = self.embed_tokens(ids)
        if visual is not None and features is not None:
            x = torch.where(visual[..., None], features, x)
        return x


class _Attention(nn.Module):
    is_causal = True

    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, index
        self._heads, self._kv_heads = config.num_attention_heads, config.num_key_value_heads
        self._head_dim = config.hidden_size // self._heads
        self.scaling = self._head_dim**-0.5
        width = (self._heads + 2 * self._kv_heads) * self._head_dim
        self.qkv_proj = nn.Linear(config.hidden_size, width)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def project(
        self, x: Tensor, rope: tuple[Tensor, Tensor], queries: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q [B, H, T, D] and k [B, Hk, T, D] after RoPE, and v; without `queries`, H is 0."""
        count = self._heads if queries else 0
        first = (self._heads - count) * self._head_dim
        weight, bias = self.qkv_proj.weight[first:], self.qkv_proj.bias[first:]
        heads = functional.linear(x, weight, bias).unflatten(-1, (-1, self._head_dim))
        plain, v = heads.transpose(1, 2).split([count + self._kv_heads, self._kv_heads], 1)
        turned = torch.addcmul(plain * rope[0], plain.roll(self._head_dim // 2, -1), rope[1])
        q, k = turned.split([count, self._kv_heads], 1)
        return q, k, v

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: Past | None
    ) -> Tensor:
        q, k, v = self.project(x, rope)
        if past is not None:
            k, v = past.add(self.layer_idx, k, v)
        function = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        out, _ = function(self, q, k, v, mask, scaling=self.scaling)
        projected: Tensor = self.o_proj(out.flatten(2))
        return projected


class _Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        out: Tensor = self.down_proj(functional.silu(gate) * up)
        return out


class _Layer(nn.Module):
    def __init__(self, config: Any, index: int) -> None:
        super().__init__()
        if config.hidden_act != "silu":
            raise NotImplementedError(f"Decoder: hidden_act must be silu; got {config.hidden_act}")
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = _Attention(config, index)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = _Mlp(config)

    def forward(
        self, x: Tensor, rope: tuple[Tensor, Tensor], mask: Tensor, past: Past | None
    ) -> Tensor:
        return self.rest(x + self.self_attn(self.input_layernorm(x), rope, mask, past))

    def rest(self, x: Tensor) -> Tensor:
        """What comes after attention."""
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def _names(name: str) -> list[str]:
    """The names in transformers of what one parameter holds."""
    path, _, last = name.rpartition(".")
    above, _, module = path.rpartition(".")
    if name.startswith("lm_head."):
        return [name]
    parts = _FUSED.get(module, (module,))
    return [_PREFIX + ".".join(filter(None, (above, part, last))) for part in parts]
