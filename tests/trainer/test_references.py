"""The store of references: any rows of any rollouts, as they were added, where they were asked for.

The trainer's own use of it is in test_regressions.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ral_kernels as rk
from ral.references import References

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def numbers(*values: int) -> Tensor:
    return torch.tensor(values)


def rows(*of: int) -> Tensor:
    """Probabilities [b, 2], one row a rollout, that say which it is."""
    return torch.stack([torch.tensor([float(each), -float(each)]) for each in of])


def snapshots(*of: int) -> rk.AttentionSnapshot:
    q = torch.stack([torch.full((2, 3, 4), float(each)) for each in of])
    return rk.AttentionSnapshot(q, q[:, :1])


def test_rows_of_any_kind_follow_their_rollouts() -> None:
    references = References()
    references.add("old", {1: [snapshots(0, 1), snapshots(2)], 4: [snapshots(0, 1, 2)]})
    references.add("shares", {1: [rows(0, 1), rows(2)]})
    for parts in ([], [numbers(2, 0), numbers(1)]):
        if parts:
            references.split(parts)
        for index in (numbers(2, 0), numbers(1), numbers(1, 2, 1), numbers(0, 1, 2)):
            old, shares = (references.of(name, index, CPU) for name in ("old", "shares"))
            assert list(old) == [1, 4] and list(shares) == [1]
            assert torch.equal(shares[1], rows(*index.tolist()))
            for layer in old:
                assert torch.equal(old[layer].q, snapshots(*index.tolist()).q)
                assert torch.equal(old[layer].k, snapshots(*index.tolist()).k)
    assert "old" in references and "ref" not in references
    references.clear()
    assert "old" not in references and references.nbytes == 0


def test_forwards_may_come_in_any_order_and_number() -> None:
    """As in an engine that sorts rollouts by their lengths into micro-batches of its own."""
    references = References()
    references.add("old", {0: [rows(7, 3)]}, numbers(7, 3))
    references.add("old", {0: [rows(5)]}, numbers(5))
    references.add("old", {0: [rows(8, 9)]})  # after the ones that are there
    index = numbers(9, 3, 5)
    assert torch.equal(references.of("old", index, CPU)[0], rows(9, 3, 5))
    assert references.nbytes == 5 * 2 * 4
    references.split([numbers(3, 9), numbers(8, 7)])  # 5 is in none
    assert references.nbytes == 4 * 2 * 4
    assert torch.equal(references.of("old", numbers(7, 3), CPU)[0], rows(7, 3))


def test_what_cannot_be_kept_or_found() -> None:
    references = References()
    references.add("old", {0: [rows(0, 1)]})
    with pytest.raises(ValueError, match=r"does not have; got \[1, 2\], with \[0, 1\] here"):
        references.add("old", {0: [rows(1, 2)]}, numbers(1, 2))
    with pytest.raises(ValueError, match=r"must hold 2 rollouts .* got \[4, 4\]"):
        references.add("ref", {0: [rows(4, 4)]}, numbers(4, 4))
    with pytest.raises(ValueError, match=r"must hold 2 rollouts .* got \[4\]"):
        references.add("ref", {0: [rows(4, 5)]}, numbers(4))
    with pytest.raises(ValueError, match="the same number of rows; got 1, 2"):
        references.add("ref", {0: [rows(4, 5)], 1: [rows(4)]})
    with pytest.raises(ValueError, match="the same number of rows; got none"):
        references.add("ref", {})
    with pytest.raises(KeyError, match="'ref' was not added; old was"):
        references.of("ref", numbers(0), CPU)
    with pytest.raises(KeyError, match=r"rollouts \[2\] of 'old' were not added"):
        references.of("old", numbers(0, 2), CPU)
    assert torch.equal(references.of("old", numbers(0, 1), CPU)[0], rows(0, 1))


def test_pinned_memory_needs_an_accelerator() -> None:
    references = References("pinned")
    if torch.accelerator.is_available():
        references.add("old", {0: [snapshots(0, 1)], 1: [rows(0, 1)]})
        assert references.of("old", numbers(1), CPU)[0].q.is_pinned()
        assert references.of("old", numbers(1), CPU)[1].is_pinned()
    else:
        for kept in (snapshots(0, 1), rows(0, 1)):
            with pytest.raises(RuntimeError, match="'pinned' needs an accelerator"):
                references.add("old", {0: [kept]})


WITHOUT_TRL = """
import sys
from pathlib import Path
sys.modules["trl"] = sys.modules["accelerate"] = None  # importing it raises
import ral
import ral.references, ral.losses, ral.exploration
"""


@pytest.mark.slow(stands_in="test_rows_of_any_kind_follow_their_rollouts")
def test_it_needs_no_trl() -> None:
    """So that another engine can use it, in an environment that TRL does not share."""
    subprocess.run([sys.executable, "-c", WITHOUT_TRL], cwd=ROOT, check=True)
