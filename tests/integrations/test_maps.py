"""What an `AttentionMap` can do: words, single layers and heads, neutral maps, files."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
from PIL import Image

from benchmarks.harness.photographs import load
from ral_kernels.integrations.transformers.attention_map import attention_map
from ral_kernels.viz import AttentionMap, Parts
from ral_kernels.viz.words import words_of

from . import tiny_processors

ANSWER = "A cup of coffee."

pytestmark = pytest.mark.usefixtures("one_thread")


def synthetic(
    shapes: list[tuple[int, int]], tokens: list[str], layers: int = 0, heads: int = 0,
    seed: int = 0, sink: float = 0.0, **more: Any,
) -> AttentionMap:  # fmt: skip
    """Random maps; `sink` is added to the first visual token of each picture."""
    generator = torch.Generator().manual_seed(seed)

    def policies(*lead: int) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
        grids = [torch.rand(*lead, len(tokens), *shape, generator=generator) for shape in shapes]
        for grid in grids:
            grid[..., 0, 0] += sink
        total = torch.stack([grid.sum((-2, -1)) for grid in grids]).sum(0) / 0.7
        made = tuple(grid / total[..., None, None] for grid in grids)
        shares = torch.stack([grid.sum((-2, -1)) for grid in made], dim=-1)
        return made, shares, 1 - shares.sum(-1)

    grids, image_shares, text_shares = policies()
    parts = None
    if layers or heads:
        numbers = tuple(range(layers))
        parts = Parts(numbers, heads, *policies(max(layers, 1), max(heads, 1)))
    return AttentionMap(
        tokens=tuple(tokens),
        token_ids=torch.arange(len(tokens)),
        text="".join(tokens),
        grids=grids,
        boxes=((0.0, 0.0, 1.0, 1.0),) * len(shapes),
        image_shares=image_shares,
        text_shares=text_shares,
        images=tuple(
            Image.fromarray(
                np.random.default_rng(i).integers(0, 255, (14 * r, 14 * c, 3), np.uint8)
            )
            for i, (r, c) in enumerate(shapes)
        ),
        layers=tuple(range(layers)) or (1,),
        parts=parts,
        **more,
    )


WORDS: list[tuple[list[str], list[str]]] = [
    (["A", " cup", " of", " cof", "fee", "."], ["A", " cup", " of", " coffee", "."]),
    ([" n", "é 1/2", "é 2/2", "e"], [" née"]),
    ([" é 1/2", " é 2/2"], [" é"]),
    (["漢 1/3", "漢 2/3", "漢 3/3", "字"], ["漢", "字"]),
    (["don", "'t", " well", "-", "known"], ["don't", " well-known"]),
    (["(", "x", ")", ",", " y"], ["(", "x", ")", ",", " y"]),
    ([" end", "<|im_end|>"], [" end", "<|im_end|>"]),
    (["</s>", "a"], ["</s>", "a"]),
    (["a", "\n", "b", "\n\n", " c"], ["a", "\n", "b", "\n\n", " c"]),
    ([" 안", "녕", " 하세요"], [" 안녕", " 하세요"]),
    (["1", "/2", " 3", "4"], ["1/2", " 34"]),
    ([""], [""]),
    ([], []),
]


@pytest.mark.parametrize("tokens, wanted", WORDS)
def test_word_pieces_are_joined(tokens: list[str], wanted: list[str]) -> None:
    words = synthetic([(2, 2)], tokens).words if tokens else words_of(tokens)
    assert [word.text for word in words] == wanted
    assert [number for word in words for number in word.tokens] == list(range(len(tokens)))


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_layers_and_heads_are_eagers(family: str, attn_implementation: str) -> None:
    processor = tiny_processors.build(family)
    model = tiny_processors.model_for(family, processor, attn_implementation)
    picture = load("coffee.png").resize((112, 84))
    prompt = tiny_processors.PLACEHOLDER[family] + " What is it?"
    seen: dict[str, Any] = {}
    hook = model.register_forward_pre_hook(
        lambda module, args, options: seen.update(options), with_kwargs=True
    )
    options: dict[str, Any] = {"response": ANSWER, "layers": "all"}
    made = attention_map(model, processor, picture, prompt, by_layer=True, by_head=True, **options)
    hook.remove()
    eager = tiny_processors.model_for(family, processor, "eager")
    with torch.no_grad():
        attentions = eager(**{**seen, "output_attentions": True}).attentions
    assert made.parts is not None and made.parts.layers == tuple(range(len(attentions)))
    ids = seen["input_ids"][0]
    keys = (ids == model.config.image_token_id).nonzero().flatten()
    rows = torch.arange(len(ids) - len(made.tokens), len(ids))
    for layer, attention in enumerate(attentions):
        assert made.parts.heads == attention.shape[1]
        policy = attention[0].double()[:, rows]
        policy[:, torch.arange(len(rows)), rows] = 0
        policy /= policy.sum(-1, keepdim=True)
        wanted = policy[..., keys].view(made.parts.grids[0][layer].shape)
        assert torch.allclose(made.parts.grids[0][layer].double(), wanted, atol=1e-5)
        only = attention_map(model, processor, picture, prompt, response=ANSWER, layers=layer)
        with_layers = attention_map(model, processor, picture, prompt, by_layer=True, **options)
        assert torch.allclose(with_layers.at(layer=layer).grids[0], only.grids[0], atol=1e-6)
        assert with_layers.at(layer=layer).layers == (layer,) and only.parts is None
    one = made.at(layer=1, head=2)
    assert torch.equal(one.grids[0], made.parts.grids[0][1, 2]) and one.parts is None
    assert one.source.startswith("layer 1, head 2")
    assert torch.allclose(made.at(head=2).grids[0], made.parts.grids[0][:, 2].mean(0))
    assert made.at() is made
    heads = attention_map(model, processor, picture, prompt, by_head=True, **options)
    assert heads.parts is not None and heads.parts.layers == ()
    assert torch.allclose(heads.at(head=1).grids[0], made.at(head=1).grids[0], atol=1e-6)


def test_parts_that_were_not_kept() -> None:
    maps = synthetic([(2, 3)], ["a"], layers=2)
    for options, message in (
        ({"layer": 2}, r"layer must be one of \[0, 1\], which by_layer=True keeps; got 2"),
        ({"head": 0}, r"head must lie in \[0, 0\), which by_head=True keeps; got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            maps.at(**options)  # type: ignore[arg-type]
    chosen = synthetic([(2, 3)], ["a", "b", "c"], layers=2, heads=2).select([2, 0])
    assert chosen.parts is not None and chosen.parts.text_shares.shape == (2, 2, 2)


def test_sinks_vanish() -> None:
    """A visual token that every prompt attends to has no more than its share of the rest."""
    tokens = ["a", "b"]
    maps = synthetic([(4, 6), (3, 3)], tokens, layers=2, sink=20.0)
    neutral = synthetic([(4, 6), (3, 3)], tokens[:1], layers=2, seed=1, sink=20.0)
    neutral = replace(neutral, prompt="Describe the image.")
    made = maps.relative_to(neutral)
    assert made.relative == "Describe the image."
    assert (maps.grids[0][:, 0, 0] > 10 * maps.grids[0].flatten(1).median(1).values).all()
    assert (made.grids[0][:, 0, 0] < 2 * made.grids[0].flatten(1).median(1).values).all()
    # The definition, by hand.
    n = torch.cat([grid.double().mean(0).flatten() for grid in neutral.grids])
    p = torch.cat([grid.double().flatten(1) for grid in maps.grids], dim=1)
    ratio = p / n.clamp(min=0.01 * float(n.mean()))
    wanted = ratio * p.sum(1, keepdim=True) / ratio.sum(1, keepdim=True)
    got = torch.cat([grid.double().flatten(1) for grid in made.grids], dim=1)
    assert torch.allclose(got, wanted, atol=1e-6)
    assert torch.equal(made.text_shares, maps.text_shares)
    assert torch.allclose(made.image_shares.sum(-1) + made.text_shares, torch.ones(2), atol=1e-5)
    assert made.parts is not None and maps.parts is not None
    assert made.parts.grids[0][..., 0, 0].max() < 0.5 * maps.parts.grids[0][..., 0, 0].min()


def test_relative_to_with_zeros() -> None:
    maps = synthetic([(2, 2)], ["a", "b"])
    grid = maps.grids[0].clone()
    grid[0] = 0  # a token that looks at nothing
    grid[1, 0, 0] = 0
    maps = replace(maps, grids=(grid,), image_shares=grid.sum((1, 2))[:, None])
    nothing = replace(maps, grids=(torch.zeros(1, 2, 2),))
    for neutral in (maps, nothing):
        made = maps.relative_to(neutral)
        assert torch.isfinite(made.grids[0]).all() and float(made.grids[0][0].sum()) == 0
        assert float(made.grids[0][1, 0, 0]) == 0
        assert torch.allclose(made.image_shares, maps.image_shares, atol=1e-6)


def test_relative_to_a_prompt() -> None:
    processor = tiny_processors.build("qwen2_5_vl")
    model = tiny_processors.model_for("qwen2_5_vl", processor)
    picture, place = load("coffee.png"), tiny_processors.PLACEHOLDER["qwen2_5_vl"]
    options: dict[str, Any] = {
        "generate_options": {"suppress_tokens": [model.config.image_token_id]}
    }
    neutral = attention_map(
        model, processor, picture, f"{place} Describe it.", max_new_tokens=1, **options
    )
    plain = attention_map(model, processor, picture, f"{place} What?", response=ANSWER, **options)
    by_text = attention_map(
        model, processor, picture, f"{place} What?", response=ANSWER,
        relative_to=f"{place} Describe it.", **options,
    )  # fmt: skip
    by_map = attention_map(
        model, processor, picture, f"{place} What?", response=ANSWER, relative_to=neutral, **options
    )
    for made in (by_text, by_map):
        assert torch.equal(made.grids[0], plain.relative_to(neutral).grids[0])
    assert not torch.allclose(by_map.grids[0], plain.grids[0])
    with pytest.raises(TypeError, match="relative_to must be a prompt or an AttentionMap; got int"):
        attention_map(model, processor, picture, place, response="A", relative_to=3)


def test_neutral_maps_that_do_not_fit() -> None:
    maps = synthetic([(2, 3)], ["a"], layers=2)
    with pytest.raises(ValueError, match=r"must have grids \[\(2, 3\)\]; got \[\(3, 3\)\]"):
        maps.relative_to(synthetic([(3, 3)], ["a"]))
    with pytest.raises(ValueError, match="must keep the same layers and heads; got none"):
        maps.relative_to(synthetic([(2, 3)], ["a"]))
    with pytest.raises(TypeError, match="must be an AttentionMap; got str"):
        maps.relative_to("a")  # type: ignore[arg-type]


@pytest.mark.parametrize("layers, heads", [(0, 0), (2, 3)])
def test_what_is_saved_is_loaded(tmp_path: Path, layers: int, heads: int) -> None:
    maps = synthetic(
        [(4, 6), (2, 2)], ["né", " 漢"], layers, heads, kinds=("image", "frame"),
        times=(None, 1.5), model="Tiny", prompt="What?", relative="Describe it.",
    )  # fmt: skip
    path = maps.save(tmp_path / "a map")  # under that name, without a suffix
    assert path == tmp_path / "a map" and path.exists()
    made = AttentionMap.load(path)
    for field in fields(AttentionMap):
        mine, other = getattr(maps, field.name), getattr(made, field.name)
        if field.name == "images":
            assert all(
                np.array_equal(*map(np.asarray, pair)) for pair in zip(mine, other, strict=True)
            )
        elif field.name == "grids":
            assert all(torch.equal(*pair) for pair in zip(mine, other, strict=True))
        elif isinstance(mine, torch.Tensor):
            assert torch.equal(mine, other)
        elif field.name == "parts" and mine is not None:
            assert (other.layers, other.heads) == (mine.layers, mine.heads)
            assert torch.equal(mine.grids[1], other.grids[1])
            assert torch.equal(mine.text_shares, other.text_shares)
        else:
            assert mine == other, field.name


def test_files_that_are_no_maps(tmp_path: Path) -> None:
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "pickled.npz", head=np.array([{"a": 1}], dtype=object))
    (tmp_path / "text.npz").write_text("no map")
    newer = synthetic([(2, 2)], ["a"]).save(tmp_path / "newer.npz")
    with np.load(newer) as file:
        arrays = dict(file)
    head = arrays["head"].tobytes().replace(b'"version": 1', b'"version": 9')
    np.savez(newer, **{**arrays, "head": np.frombuffer(head, np.uint8)})
    for name in ("other", "pickled", "text"):
        with pytest.raises(ValueError, match=rf"path must be a map that .* wrote; got .*{name}"):
            AttentionMap.load(tmp_path / f"{name}.npz")
    with pytest.raises(ValueError, match="it is of version 9; this is 1"):
        AttentionMap.load(newer)
    with pytest.raises(OSError):
        AttentionMap.load(tmp_path / "none.npz")


def test_names_and_repr() -> None:
    maps = synthetic(
        [(2, 2)] * 3, ["a"], kinds=("image", "frame", "frame"), times=(None, 0.0, 0.5), model="M"
    )
    assert [maps.name(i) for i in range(3)] == ["image 1", "frame 2, 0.0 s", "frame 3, 0.5 s"]
    assert repr(maps) == (
        "AttentionMap(1 tokens 'a', 1 image and 2 frames, layer 1 of M, 70 % of the attention on "
        "pictures)"
    )
    assert replace(maps, layers=(0, 1, 2)).source == "mean of layers 0-2 of M"
    assert replace(maps, layers=(0, 7), model="").source == "mean of 2 layers"
    assert synthetic([(2, 2)], ["a"]).name(0) == "image"
