"""`Spans`: construction, algebra, and the layouts of real Qwen-VL processors."""

from __future__ import annotations

import copy
import pickle
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._functorch.compilers import nop
from torch.fx.experimental.proxy_tensor import make_fx

import ral_kernels as rk
from tests.hypothesis_settings import REPRODUCIBLE

IMAGE, VIDEO, START, END, TEXT, PAD = 151655, 151656, 151652, 151653, 9, 151643


def ids_of(spans: rk.Spans) -> Any:
    return spans.ids.tolist()


def test_ids_become_contiguous_int32() -> None:
    ids = torch.tensor([[0, 1], [1, -1], [2, 0]]).mT
    spans = rk.Spans(ids, 3)
    assert spans.ids.dtype == torch.int32 and spans.ids.is_contiguous()
    assert (spans.batch_size, spans.seqlen_k, spans.num_spans) == (2, 3, 3)
    assert ids_of(spans) == ids.tolist()


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(7,), (2, 7)])
def test_ids_are_a_copy(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    buffer = torch.zeros(shape, dtype=dtype).numpy()
    spans = rk.Spans(torch.from_numpy(buffer), 3)
    buffer[:] = 7 * 10**7
    assert not spans.ids.any()


def test_ids_that_change_are_checked_by_the_next_call(backend: str) -> None:
    q = torch.randn(1, 1, 7, 8)
    spans = rk.Spans(torch.zeros(7, dtype=torch.int32), 3)
    spans.ids[2] = 2  # in place, and valid
    marginals = rk.attention(q, q, q, spans, backend=backend).marginals
    assert marginals is not None and bool((marginals[..., 2] > 0).all())
    spans.ids[3] = 50
    with pytest.raises(ValueError, match=r"ids must be in \[-1, num_spans=3\); got .* 0 to 50"):
        rk.attention(q, q, q, spans, backend=backend)
    with pytest.raises(ValueError, match="ids must be in"):
        rk.attention_policy(q, q, spans=spans, backend=backend)
    with pytest.raises(ValueError, match="ids must be in"):
        spans.extend_to(9)


@pytest.mark.parametrize(
    ("name", "value", "exception"),
    [
        ("ids", torch.full((7,), 3, dtype=torch.int32), ValueError),
        ("ids", torch.zeros(7, dtype=torch.int64), TypeError),
        ("ids", torch.zeros(7), TypeError),
        ("ids", torch.zeros(1, 1, 7, dtype=torch.int32), ValueError),
        ("ids", [0] * 7, TypeError),
        ("num_spans", 0, ValueError),
        ("num_spans", -1, ValueError),
        ("num_spans", 2.0, TypeError),
    ],
)
def test_every_way_in_is_checked(name: str, value: Any, exception: type[Exception]) -> None:
    q = torch.randn(1, 1, 7, 8)
    spans = rk.Spans(torch.zeros(7, dtype=torch.int32), 3)
    setattr(spans, name, value)
    with pytest.raises(exception, match=rf"^Spans: {name}|^Spans: ids must be in"):
        rk.attention(q, q, q, spans)
    if exception is TypeError and isinstance(value, Tensor) and value.dtype == torch.int64:
        assert pickle.loads(pickle.dumps(spans)).ids.dtype == torch.int32
        return
    for again in (copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        with pytest.raises(exception, match=r"^Spans: "):
            again(spans)


def test_copies_and_pickles_are_the_same_spans() -> None:
    spans = rk.Spans.from_lengths([2, 3], start=1)
    for other in (copy.copy(spans), copy.deepcopy(spans), pickle.loads(pickle.dumps(spans))):
        assert other == spans and other.ids.data_ptr() != spans.ids.data_ptr()


def test_ids_that_are_assigned_become_contiguous() -> None:
    spans = rk.Spans(torch.zeros(2, 7, dtype=torch.int32), 3)
    spans.ids = torch.arange(14, dtype=torch.int32).reshape(7, 2).mT % 3
    spans.check()
    assert spans.ids.is_contiguous() and ids_of(spans)[1][:3] == [1, 0, 2]


def test_inference_mode() -> None:
    """Its tensors do not count their versions."""
    with torch.inference_mode():
        spans = rk.Spans(torch.zeros(7, dtype=torch.int32), 3)
        q = torch.randn(1, 1, 7, 8)
        assert rk.attention(q, q, q, spans.extend_to(7)).marginals is not None


def test_ids_whose_values_cannot_be_read() -> None:
    """Under vmap and in a graph that is traced, ids out of range become -1."""
    ids = torch.tensor([[0, 1, 2], [2, 3, -5]])
    mapped = torch.vmap(lambda row: rk.Spans(row, np.int64(3)).ids)(ids)
    assert mapped.tolist() == [[0, 1, 2], [2, -1, -1]]
    q = torch.randn(2, 1, 3, 4)

    def marginals(q: torch.Tensor, ids: torch.Tensor) -> Any:
        return rk.attention(q, q, q, rk.Spans(ids, 3)).marginals

    traced = aot_function(marginals, fw_compiler=nop)(q, ids)
    assert torch.equal(traced, marginals(q, torch.tensor([[0, 1, 2], [2, -1, -1]])))
    graph = make_fx(marginals, tracing_mode="fake")(q, ids)
    assert torch.equal(graph(q, ids), traced)


def test_from_lengths() -> None:
    spans = rk.Spans.from_lengths([2, 0, 3])
    assert ids_of(spans) == [0, 0, 2, 2, 2] and spans.num_spans == 3
    spans = rk.Spans.from_lengths([2, 1], start=1, seqlen_k=6)
    assert ids_of(spans) == [-1, 0, 0, 1, -1, -1]
    assert ids_of(rk.Spans.from_lengths(torch.tensor([1, 2]))) == [0, 1, 1]
    assert rk.Spans.from_lengths([]).num_spans == 0
    numbers = rk.Spans.from_lengths(
        np.array([1, 2], np.uint8), start=np.int8(1), seqlen_k=np.int8(5)
    )
    assert ids_of(numbers) == [-1, 0, 1, 1, -1]


@REPRODUCIBLE
@given(st.lists(st.integers(0, 9), max_size=12), st.integers(0, 5), st.integers(0, 5))
def test_from_lengths_counts(lengths: list[int], before: int, behind: int) -> None:
    total = before + sum(lengths) + behind
    spans = rk.Spans.from_lengths(lengths, start=before, seqlen_k=total)
    assert spans.seqlen_k == total and spans.is_contiguous
    assert [int((spans.ids == s).sum()) for s in range(len(lengths))] == lengths
    inside = spans.ids[before : before + sum(lengths)]
    assert torch.equal(inside, inside.sort().values)


@pytest.mark.parametrize(
    ("arguments", "exception", "message"),
    [
        ({"lengths": 3}, TypeError, "lengths must be a sequence of integers, one a span; got 3"),
        ({"lengths": torch.tensor(3)}, TypeError, "lengths must be a sequence .*; got 3"),
        ({"lengths": None}, TypeError, "lengths must be a sequence .*; got None"),
        ({"lengths": [2], "seqlen_k": "7"}, TypeError, "seqlen_k must be None or an int; got '7'"),
        ({"lengths": [2, -1]}, ValueError, "lengths must be >= 0; got -1"),
        ({"lengths": [2.0]}, TypeError, "lengths must hold integers; got 2.0"),
        ({"lengths": [2], "start": -1}, ValueError, "start must be an int >= 0; got -1"),
        (
            {"lengths": [2, 3], "start": 1, "seqlen_k": 5},
            ValueError,
            "seqlen_k must be at least .* = 6; got 5",
        ),
    ],
)
def test_from_lengths_bad_input(
    arguments: dict[str, Any], exception: type[Exception], message: str
) -> None:
    with pytest.raises(exception, match=f"^Spans.from_lengths: {message}"):
        rk.Spans.from_lengths(**arguments)


@pytest.mark.parametrize(
    ("ids", "contiguous"),
    [
        ([0, 0, 1, 1], True),
        ([1, 1, 0, 0], True),
        ([-1, 0, -1, 1], True),
        ([0, -1, 0], False),
        ([0, 1, 0], False),
        ([-1, -1], True),
        ([[0, 0, 1], [1, 1, 0]], True),
        ([[0, 0, 1], [1, 0, 1]], False),
        ([], True),
    ],
)
def test_is_contiguous(ids: list[Any], contiguous: bool) -> None:
    assert rk.Spans(torch.tensor(ids, dtype=torch.int32), 2).is_contiguous is contiguous


def test_union() -> None:
    images = rk.Spans(torch.tensor([0, 0, -1, -1, 1, -1]), 2)
    videos = rk.Spans(torch.tensor([-1, -1, -1, 1, -1, 0]), 2)
    both = images.union(videos)
    assert ids_of(both) == [0, 0, -1, 3, 1, 2] and both.num_spans == 4
    batched = rk.Spans(torch.tensor([[-1, -1, -1, 0, -1, -1], [-1] * 6]), 1)
    assert ids_of(images.union(batched)) == [[0, 0, -1, 2, 1, -1], [0, 0, -1, -1, 1, -1]]
    assert ids_of(batched.union(images)) == [[1, 1, -1, 0, 2, -1], [1, 1, -1, -1, 2, -1]]


def test_union_bad_input() -> None:
    spans = rk.Spans.from_lengths([2, 2])
    with pytest.raises(
        ValueError, match=r"^Spans.union: spans must be disjoint; got 4 keys in both"
    ):
        spans.union(spans)
    with pytest.raises(
        ValueError, match=r"^Spans.union: both must cover the same keys; got \(4,\) and \(5,\)"
    ):
        spans.union(rk.Spans.from_lengths([], seqlen_k=5))
    with pytest.raises(ValueError, match=r"^Spans.union: both must cover the same keys"):
        rk.Spans(torch.full((2, 4), -1), 1).union(rk.Spans(torch.full((3, 4), -1), 1))
    with pytest.raises(TypeError, match=r"^Spans.union: other must be Spans; got Tensor"):
        spans.union(spans.ids)


def test_extend_to() -> None:
    spans = rk.Spans.from_lengths([2, 1])
    assert ids_of(spans.extend_to(5)) == [0, 0, 1, -1, -1]
    assert ids_of(rk.Spans(torch.tensor([[0], [1]]), 2).extend_to(2)) == [[0, -1], [1, -1]]
    with pytest.raises(ValueError, match=r"^Spans.extend_to: seqlen_k must be at least 3; got 2"):
        spans.extend_to(2)
    with pytest.raises(TypeError, match=r"^Spans.extend_to: seqlen_k must be an int; got '5'"):
        spans.extend_to("5")  # type: ignore[arg-type]
    assert spans.extend_to(np.int8(5)) == spans.extend_to(5)


def test_equality_and_repr() -> None:
    spans = rk.Spans.from_lengths([2, 1])
    assert spans == rk.Spans(torch.tensor([0, 0, 1]), 2)
    assert spans != rk.Spans(torch.tensor([0, 0, 1]), 3)
    assert spans != rk.Spans(torch.tensor([0, 1, 1]), 2)
    assert spans != "spans"
    assert repr(spans) == "Spans(ids=int32[3] on cpu, num_spans=2)"
    assert spans.to("meta").device.type == "meta" and spans.to("cpu") == spans


def prompt(*runs: tuple[int, int]) -> torch.Tensor:
    """input_ids from (token id, how many)."""
    return torch.tensor([token for token, count in runs for _ in range(count)])


def runs_of(spans: rk.Spans) -> list[tuple[int, int]]:
    values, counts = torch.unique_consecutive(spans.ids, return_counts=True)
    return list(zip(values.tolist(), counts.tolist(), strict=True))


def test_granularities_of_one_video() -> None:
    """A video of t=2, 4 x 6 patches: two frames of 2 x 3 tokens."""
    input_ids = prompt((TEXT, 2), (VIDEO, 12), (TEXT, 1))
    grid = torch.tensor([[2, 4, 6]])

    def inner(**options: Any) -> tuple[list[int], int]:
        spans = rk.Spans.from_vision_grid(input_ids, grid, token_id=VIDEO, **options)
        ids = ids_of(spans)
        assert ids[:2] == [-1, -1] and ids[-1] == -1
        return ids[2:-1], spans.num_spans

    assert inner() == ([0] * 6 + [1] * 6, 2)
    assert inner(granularity="image") == ([0] * 12, 1)
    assert inner(granularity="token") == (list(range(12)), 12)
    assert inner(granularity="tile", tile=(1, 2)) == ([0, 0, 1, 2, 2, 3, 4, 4, 5, 6, 6, 7], 8)
    assert inner(granularity="tile", tile=(2, 2)) == ([0, 0, 1, 0, 0, 1, 2, 2, 3, 2, 2, 3], 4)
    assert inner(granularity="tile", tile=(9, 9)) == ([0] * 6 + [1] * 6, 2)
    assert inner(granularity="tile", tile=(1, 1)) == inner(granularity="token")


def test_merge_size() -> None:
    spans = rk.Spans.from_vision_grid(
        prompt((IMAGE, 16)), [[1, 4, 4]], token_id=IMAGE, merge_size=1
    )
    assert spans.num_spans == 1 and ids_of(spans) == [0] * 16


def test_numbering_restarts_in_each_sample() -> None:
    """A left-padded batch: grids are consumed in order, the number of spans is the largest."""
    rows = [
        prompt((PAD, 5), (IMAGE, 4), (TEXT, 3)),
        prompt((TEXT, 1), (IMAGE, 4), (TEXT, 1), (IMAGE, 6)),
        prompt((TEXT, 12)),
    ]
    grid = torch.tensor([[1, 4, 4], [1, 4, 4], [1, 4, 6]])
    spans = rk.Spans.from_vision_grid(torch.stack(rows), grid, token_id=IMAGE)
    assert spans.num_spans == 2 and spans.batch_size == 3
    assert ids_of(spans) == [
        [-1] * 5 + [0] * 4 + [-1] * 3,
        [-1] + [0] * 4 + [-1] + [1] * 6,
        [-1] * 12,
    ]


def test_text_alone() -> None:
    grids: tuple[Any, ...] = (torch.empty(0, 3, dtype=torch.int64), [])
    for grid in grids:
        spans = rk.Spans.from_vision_grid(prompt((TEXT, 5)), grid, token_id=IMAGE)
        assert spans.num_spans == 0 and ids_of(spans) == [-1] * 5


def test_several_token_ids() -> None:
    """Images and videos of one prompt in its order, or apart and joined by `union`."""
    input_ids = prompt((IMAGE, 4), (TEXT, 1), (VIDEO, 8))
    together = rk.Spans.from_vision_grid(input_ids, [[1, 4, 4], [2, 4, 4]], token_id=(IMAGE, VIDEO))
    images = rk.Spans.from_vision_grid(input_ids, [[1, 4, 4]], token_id=IMAGE)
    videos = rk.Spans.from_vision_grid(input_ids, [[2, 4, 4]], token_id=VIDEO)
    assert together == images.union(videos)
    assert together.num_spans == 3


# fmt: off
BAD_GRIDS: list[tuple[dict[str, Any], type[Exception], str]] = [
    (
        {"grid_thw": [[1, 4, 6]]},
        ValueError,
        "grid_thw of 1 items describes 6 visual tokens, but input_ids holds 4",
    ),
    (
        {"token_id": VIDEO},
        ValueError,
        "grid_thw of 1 items describes 4 visual tokens, but input_ids holds 0",
    ),
    (
        {"grid_thw": [[1, 4, 5]]},
        ValueError,
        r"grid_thw must .* multiples of merge_size=2; got \(1, 4, 5\)",
    ),
    ({"grid_thw": [[0, 4, 4]]}, ValueError, "grid_thw must hold t >= 1"),
    (
        {"grid_thw": [[4, 4]]},
        ValueError,
        r"grid_thw must be \[items, 3\] of \(t, h, w\); got \(1, 2\)",
    ),
    ({"grid_thw": [[1.0, 4.0, 4.0]]}, TypeError, "grid_thw must be integers; got float32"),
    ({"grid_thw": None}, TypeError, r"grid_thw must be integers \[items, 3\] .*; got None"),
    ({"grid_thw": "1x4x4"}, TypeError, r"grid_thw must be integers \[items, 3\] .*; got '1x4x4'"),
    ({"grid_thw": [[1, 4], [4]]}, TypeError, r"grid_thw must be integers \[items, 3\] .*4\]\]?"),
    ({"input_ids": [1, 2]}, TypeError, "input_ids must be a tensor; got list"),
    ({"input_ids": torch.zeros(4)}, TypeError, "input_ids must be integers; got float32"),
    (
        {"input_ids": torch.zeros(1, 1, 4, dtype=torch.int64)},
        ValueError,
        "input_ids must be .*N.*got",
    ),
    (
        {"token_id": None},
        TypeError,
        "token_id must be an int or a non-empty sequence of ints; got None",
    ),
    ({"token_id": ()}, TypeError, r"token_id must be .*got \(\)"),
    ({"merge_size": 0}, ValueError, "merge_size must be an int >= 1; got 0"),
    (
        {"granularity": "pixel"},
        ValueError,
        "granularity must be one of frame, image, tile, token; got 'pixel'",
    ),
    ({"granularity": "tile"}, ValueError, "tile must be .*got None"),
    ({"granularity": "tile", "tile": (0, 2)}, ValueError, r"tile must be .*got \(0, 2\)"),
    ({"tile": (2, 2)}, ValueError, "tile needs granularity='tile'; got 'frame'"),
    (
        {
            "input_ids": torch.stack(
                [prompt((IMAGE, 3), (TEXT, 1)), prompt((TEXT, 3), (IMAGE, 1))]
            )
        },
        ValueError,
        "the grids must end where samples end; sample 0 holds 3 visual tokens, its grids up to "
        "item 0 describe 4",
    ),
]
# fmt: on


@pytest.mark.parametrize(("changes", "exception", "message"), BAD_GRIDS)
def test_vision_grid_bad_input(
    changes: dict[str, Any], exception: type[Exception], message: str
) -> None:
    arguments: dict[str, Any] = {
        "input_ids": prompt((TEXT, 1), (IMAGE, 4)),
        "grid_thw": [[1, 4, 4]],
        "token_id": IMAGE,
    }
    with pytest.raises(exception, match=f"^Spans.from_vision_grid: {message}"):
        rk.Spans.from_vision_grid(**{**arguments, **changes})


# Their video processors need torchvision; the functions that write the placeholders into the prompt
# do not, and are run.

SPECIAL = {
    "<|image_pad|>": IMAGE,
    "<|video_pad|>": VIDEO,
    "<|vision_start|>": START,
    "<|vision_end|>": END,
}


def tokenize(text: str) -> torch.Tensor:
    """One id for a special token, one for every other character."""
    parts = re.findall("|".join(map(re.escape, SPECIAL)) + "|.", text)
    return torch.tensor([SPECIAL.get(part, TEXT) for part in parts])


def processor_of(module: str, name: str) -> tuple[Any, SimpleNamespace]:
    transformers = pytest.importorskip("transformers")
    __import__(f"transformers.models.{module}")
    cls = getattr(transformers, name)
    sizes = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    instance = SimpleNamespace(
        image_processor=sizes,
        video_processor=sizes,
        image_token="<|image_pad|>",
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
    )
    if hasattr(cls, "_calculate_timestamps"):
        instance._calculate_timestamps = lambda *a, **kw: cls._calculate_timestamps(
            instance, *a, **kw
        )
    return cls, instance


def test_images_of_the_real_image_processor() -> None:
    """`image_grid_thw` from the processor, placeholders from Qwen2.5-VL's function."""
    transformers = pytest.importorskip("transformers")
    image_processor = getattr(transformers, "Qwen2VLImageProcessorPil", None)
    if image_processor is None:
        pytest.skip("this transformers has no image processor that works without torchvision")
    from PIL import Image

    images = [Image.new("RGB", size) for size in ((112, 84), (56, 168))]
    processed = image_processor(min_pixels=56 * 56, max_pixels=224 * 224)(
        images=images, return_tensors="pt"
    )
    grid = processed["image_grid_thw"]
    assert grid.shape == (2, 3) and (grid[:, 0] == 1).all()
    cls, instance = processor_of("qwen2_5_vl", "Qwen2_5_VLProcessor")
    text = "two: "
    for i in range(2):
        text += f"<|vision_start|>{cls.replace_image_token(instance, processed, i)}<|vision_end|>"
    spans = rk.Spans.from_vision_grid(tokenize(text + "?"), grid, token_id=IMAGE)
    counts = (grid.prod(-1) // 4).tolist()
    assert runs_of(spans) == [(-1, 6), (0, counts[0]), (-1, 2), (1, counts[1]), (-1, 2)]
    # one frame an image
    assert spans == rk.Spans.from_vision_grid(
        tokenize(text + "?"), grid, token_id=IMAGE, granularity="image"
    )


def test_qwen2_5_vl_video_layout() -> None:
    """One run of placeholders a video, frames next to each other."""
    cls, instance = processor_of("qwen2_5_vl", "Qwen2_5_VLProcessor")
    videos = {"video_grid_thw": torch.tensor([[3, 4, 4], [2, 4, 8]])}
    text = "".join(
        f"v<|vision_start|>{cls.replace_video_token(instance, videos, i)}<|vision_end|>"
        for i in range(2)
    )
    spans = rk.Spans.from_vision_grid(tokenize(text), videos["video_grid_thw"], token_id=VIDEO)
    assert runs_of(spans) == [(-1, 2), (0, 4), (1, 4), (2, 4), (-1, 3), (3, 8), (4, 8), (-1, 1)]
    assert spans.is_contiguous


def test_qwen3_vl_video_layout() -> None:
    """Every frame is a run between timestamps; the whole video is then not contiguous."""
    cls, instance = processor_of("qwen3_vl", "Qwen3VLProcessor")
    grid = torch.tensor([[3, 4, 4]])
    metadata = SimpleNamespace(fps=2.0, frames_indices=[0, 1, 2, 3, 4, 5])
    videos = {"video_grid_thw": grid, "video_metadata": [metadata]}
    input_ids = tokenize("v" + cls.replace_video_token(instance, videos, 0) + "?")
    assert int((input_ids == START).sum()) == 3
    spans = rk.Spans.from_vision_grid(input_ids, grid, token_id=VIDEO)
    assert spans.num_spans == 3 and spans.is_contiguous
    frames = [run for run in runs_of(spans) if run[0] >= 0]
    assert frames == [(0, 4), (1, 4), (2, 4)]
    assert [run for run in runs_of(spans) if run[0] < 0][1][1] > 2  # a timestamp stands between
    video = rk.Spans.from_vision_grid(input_ids, grid, token_id=VIDEO, granularity="image")
    assert video.num_spans == 1 and not video.is_contiguous


def test_generated_tokens_follow_the_prompt() -> None:
    """Rollouts: spans of the prompt, extended over what was generated, work in `attention`."""
    input_ids = prompt((IMAGE, 4), (TEXT, 2))
    spans = rk.Spans.from_vision_grid(input_ids, [[1, 4, 4]], token_id=IMAGE).extend_to(9)
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 9, 8)
    marginals = rk.attention(q, k, k, spans, is_causal=True).marginals
    assert marginals is not None and marginals.shape == (1, 2, 3, 1)
