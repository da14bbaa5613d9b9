"""What training did to attention on the task `chain`: the looks of rollouts, and their changes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

import ral_kernels as rk
from benchmarks.study import mechanism
from benchmarks.study import run as one
from benchmarks.study.decoder import Decoder
from benchmarks.study.mechanism import Watched, differing, named_frames
from benchmarks.study.prompts import Reader
from ral.attention_statistics import differing_prefixes
from ral.digits.chains import WORDS, make_chain, thought
from ral.digits.model import make_model, make_processor, make_tokenizer, save_start

pytestmark = pytest.mark.xdist_group("study")


def _made(seed: int = 0) -> tuple[torch.nn.Module, Reader]:
    tokenizer = make_tokenizer(WORDS)
    model = make_model(attn_implementation="eager", seed=seed, tokenizer=tokenizer)
    return model, Reader(model, make_processor(tokenizer))


def test_looks_of_a_response() -> None:
    """Each digit after a frame's time, and no other token; the answer's time has no digits."""
    tokenizer, chain = make_tokenizer(WORDS), make_chain(8, "test", 3, 5)
    words, answer = thought(chain)
    right = f"<think>{words}</think><answer>{answer}</answer>"
    path = chain.path[: chain.looks].tolist()
    parts = words.split(" ")
    assert chain.times is not None
    parts[2] = str((int(parts[2]) + 1) % 10)  # the first tens
    parts[4] = next(f"{second}s" for second in range(100) if second not in chain.times)
    wrong = f"<think>{' '.join(parts)}</think><answer>{answer}</answer>"
    ids = torch.tensor([tokenizer(text)["input_ids"] for text in (right, wrong)])
    named, misread = named_frames(tokenizer, ids, [chain, chain])
    wanted = [frame for frame in path for _ in range(2)]
    assert named[0, named[0] >= 0].tolist() == wanted
    assert (named[0] >= 0).nonzero()[:, 0].tolist() == [2, 3, 5, 6, 8, 9, 11, 12]
    assert named[1, named[1] >= 0].tolist() == wanted[:2] + wanted[4:]  # no frame has that time
    assert not misread[0].any() and misread[1].nonzero()[:, 0].tolist() == [2]
    cut, _ = named_frames(tokenizer, ids[:, :3], [chain, chain])
    assert torch.equal(cut, named[:, :3])


def test_prefixes_that_differ_are_those_of_the_trainer() -> None:
    ids = torch.randint(2, (12, 6), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(6) < torch.tensor([6, 5, 4] * 4)[:, None]
    found = differing(ids, mask, 3)
    count, total = differing_prefixes(ids, mask, 3).tolist()
    assert 0 < int(found.sum()) == count < total == int(mask.sum())


def test_attention_is_that_of_the_models_maps_and_its_change_is_what_training_did() -> None:
    model, reader = _made()
    start, moved = Decoder.of(model), Decoder.of(make_model(tokenizer=reader.tokenizer, seed=1))
    watched = Watched(reader, start, 6, groups=3)
    prompts = watched._prompts
    fields = dict(prompts.fields)
    said, real = watched.ids[::8], watched.mask[::8]  # a rollout of each prompt
    length = said.shape[1]
    fields["input_ids"] = torch.cat([prompts.ids, said], 1)
    fields["attention_mask"] = torch.cat([prompts.mask, real], 1).long()
    fields["mm_token_type_ids"] = functional.pad(fields["mm_token_type_ids"], (0, length))
    maps = model(**fields, output_attentions=True, use_cache=False).attentions[-1].mean(1)
    rows = maps[:, -length - 1 : -1]
    ids = rk.spans_for(model.config, fields, "frame").spans.ids
    shares = torch.stack([(rows * (ids == n)[:, None]).sum(-1) for n in range(6)], -1)
    wanted = shares / shares.sum(-1, keepdim=True)
    found = watched.before[::8]
    torch.testing.assert_close(found[real], wanted[real].detach(), rtol=1e-4, atol=1e-6)

    # What a start writes names no frame: let some of its tokens be looks, and others not.
    watched.named = torch.where(torch.arange(length) % 2 == 0, 4, -1).expand(24, -1)
    watched.misread = watched.named == 5
    watched.misread[:, 2] = True
    watched.advantages = torch.linspace(-1, 1, 24)
    same = watched.change(start)
    assert (same.right_before, same.wrong_before, same.divergence) == pytest.approx((0, 0, 0)) or (
        math.isnan(same.right_before) and same.wrong_before == same.divergence == 0
    )
    now = watched.policy(moved)
    change = watched.change(moved)
    p, r = now.double(), watched.before.double()
    m = (p + r) / 2
    jsd = 0.5 * (p * (p / m).log() + r * (r / m).log()).sum(-1)
    assert change.divergence == pytest.approx(float(jsd[watched.mask].mean()), rel=1e-3)
    gain = (now - watched.before)[..., 4]
    looks = (watched.named >= 0) & watched.mask
    low = looks & (watched.before[..., 4] < 0.5)
    assert change.wrong_before == pytest.approx(float(gain[low].mean()), rel=1e-4)
    assert change.misread == pytest.approx(float(gain[looks & watched.misread].mean()), rel=1e-4)
    chosen = looks & differing(watched.ids, watched.mask, 8)
    advantages = watched.advantages[:, None].expand_as(chosen)[chosen]
    by_hand = torch.corrcoef(torch.stack([gain[chosen], advantages]))[0, 1]
    assert change.with_reward == pytest.approx(float(by_hand), abs=1e-5)


def test_a_study_whose_weights_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mechanism, "EXTENTS", (6,))
    monkeypatch.setattr(mechanism, "GROUPS", 2)
    tokenizer = make_tokenizer(WORDS)
    plan = one.Plan(tmp_path, 1, 2, keep_weights=True)
    model = make_model(tokenizer=tokenizer)
    save_start(plan.start(mechanism.TASK, "think"), model, make_processor(tokenizer))
    queries = {str(size): [[0.0] * 8, [0.25, 0.75] * 4] for size in mechanism.TASK.evaluated}
    for arm, seed in (("start", 0), ("grpo", 3)):
        made = {"arm": arm, "seed": seed, "target_queries": queries}
        plan.result("chain", arm, seed).parent.mkdir(exist_ok=True)
        plan.result("chain", arm, seed).write_text(json.dumps(made))
    moved = Decoder.of(make_model(tokenizer=tokenizer, seed=1))
    one.keep(moved, plan.weights("chain", "grpo", 3))
    assert mechanism.main([str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "50, 50, 50, 50" in said and "GRPO" in said
    assert len([line for line in said.splitlines() if line.startswith("GRPO")]) == 2
    found = mechanism.of_study(plan, [{"arm": "grpo", "seed": 3}])
    assert found["grpo", 3, 6].divergence > 0


def test_a_correlation_is_compared_with_that_of_grpo_seed_by_seed() -> None:
    runs: list[dict[str, Any]] = [
        {"arm": arm, "seed": seed} for arm in ("grpo", "ral_1_last") for seed in (3, 4, 5)
    ]
    of = {
        (run["arm"], run["seed"], 16): mechanism.Change(
            *[0.0] * 7, 0.1 * run["seed"] - 0.02 * (run["arm"] != "grpo")
        )
        for run in runs
    }
    del of["grpo", 5, 16]
    heads, grpo, ral = mechanism.changes(runs, of, 16)
    assert heads[-1] == "... less GRPO's" and grpo[-1] == ""
    assert ral[-2].startswith("+0.380 ±") and ral[-1] == "−0.020 ± 0.000"
