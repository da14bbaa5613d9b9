"""`captured.sharded`: a model whose sequence ranks share has the whole sequence's gradients."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ral_kernels.integrations.transformers.capture import capture
from tests.integrations.eager_maps import perturbed
from tests.integrations.models import build
from tests.integrations.sharded_model import LAYOUTS

ADVANTAGES = torch.tensor([1.0, -0.5])


def test_a_captured_layer_of_a_shard(tmp_path: Any) -> None:
    """`sharded` gives the layer's scale, window and soft cap; a group of one has the whole."""
    model, old = build("gemma3"), perturbed(build("gemma3"))
    ids = torch.randint(2, 256, (2, 20), generator=torch.Generator().manual_seed(1))
    store = f"file://{tmp_path}/store"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        with torch.no_grad(), capture(old, 0, rows=(8, 19)) as before:
            old(input_ids=ids, use_cache=False)
        with capture(model, 0, rows=(8, 19)) as captured:
            model(input_ids=ids, use_cache=False)
        wanted = captured.ral_loss(before.snapshot(), ADVANTAGES)
        sharded = captured.sharded(moves="rows")
        assert sharded.plan.window_left == 7
        loss = sharded.ral_loss(before.sharded(moves="rows").snapshot(), ADVANTAGES)
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(loss, wanted, atol=1e-8, rtol=1e-5)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, dict[str, Any]]:
    file = tmp_path_factory.mktemp("sharded") / "found.pt"
    done = subprocess.run(
        [sys.executable, "-m", "tests.integrations.sharded_model", str(file)],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=600, check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results: dict[Any, dict[str, Any]] = torch.load(file)
    return results


@pytest.mark.slow(stands_in="test_a_captured_layer_of_a_shard")
@pytest.mark.parametrize("moves", ["keys", "rows"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_get_the_whole_gradient(layout: str, moves: str, found: Any) -> None:
    """A token loss and ten times the RAL loss, summed over two ranks."""
    result = found[layout, moves]
    assert result["loss"] == pytest.approx(result["wanted"], rel=1e-5) and result["loss"] != 0
    assert result["found"].keys() == result["whole"].keys()
    for name, wanted in result["whole"].items():
        error = (result["found"][name] - wanted).abs().max()
        assert error <= 1e-5 * wanted.abs().max() + 1e-8, name


def test_a_generation_is_no_shard() -> None:
    model = build("qwen2")
    with capture(model) as captured:
        model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    with pytest.raises(NotImplementedError, match=r"a forward without `steer`; got a generation"):
        captured.sharded()
