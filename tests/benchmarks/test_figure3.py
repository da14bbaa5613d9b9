"""The study that `benchmarks.figure3` runs: arms, controls, statistics, and a whole run."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import figure3
from benchmarks.study import plot, report, task_pictures, token_looks
from benchmarks.study import run as one
from benchmarks.study.arms import ARMS, BUDGET, QUICK, ROLLOUTS
from benchmarks.study.decoder import Decoder
from benchmarks.study.engine import Engine, Rollouts
from benchmarks.study.evaluate import TEST_SEED, HeldOut, TargetAttention, sharpened
from benchmarks.study.prompts import Reader
from benchmarks.study.statistics import deviation, estimate, holm, paired
from benchmarks.study.tasks import TASKS
from ral import RALConfig
from ral.digits.evaluate import evaluate
from ral.digits.model import make_model, make_processor, make_tokenizer, save_start
from ral.digits.start import WORDS_OF

pytestmark = pytest.mark.xdist_group("study")  # one worker prepares what is evaluated


@pytest.fixture(scope="module")
def plan(tmp_path_factory) -> one.Plan:
    """A study whose start and teacher are random models."""
    plan = one.Plan(tmp_path_factory.mktemp("study"), 1, 2)
    for task in TASKS.values():
        for style in ("think", "direct"):
            save_start(plan.start(task, style))
        save_start(plan.teacher(task), make_model(seed=1))
    return plan


def test_quick_starts_from_the_bundled_model(tmp_path, monkeypatch) -> None:
    from ral.digits import load_pretrained, start
    from ral.models import load_model

    trained = []
    monkeypatch.setattr(start, "train_start", lambda *args, **options: trained.append(options))
    plan = one.Plan(tmp_path, 1, 2, start_steps=0)
    folder = one.make_start(plan, TASKS["frames"], "think")
    found, wanted = load_model(str(folder), dtype="float32"), load_pretrained()[0]
    assert all(map(torch.equal, found.parameters(), wanted.parameters())) and trained == []
    one.make_start(plan, TASKS["frames"], "direct")
    one.make_start(plan, TASKS["resolution"], "think")
    assert [options["steps"] for options in trained] == [one.SHORT_STEPS] * 2


def test_a_larger_model_and_a_limit_of_time(tmp_path, monkeypatch) -> None:
    """A start has its own shape; a run that is there counts, however late it is."""
    from ral.digits import start

    trained = []
    monkeypatch.setattr(start, "train_start", lambda *args, **options: trained.append(options))
    plan = one.Plan(tmp_path, 1, 2, shape=(4, 512))
    for task in ("chain", "chain_long"):
        one.make_start(plan, TASKS[task], "think")
    assert [(each["num_layers"], each["hidden_size"]) for each in trained] == [(4, 512)] * 2
    assert plan.start(TASKS["chain"], "think") != plan.start(TASKS["chain_long"], "think")
    job = "chain", "grpo", 0
    assert figure3._work(plan, job, until=0.0) is None
    plan.result(*job).parent.mkdir()
    plan.result(*job).write_text('{"arm": "grpo"}')
    assert figure3._work(plan, job, until=0.0) == {"arm": "grpo"}


def test_another_device_is_where_tensors_are_made() -> None:
    threads = torch.get_num_threads()
    try:
        one.be_on("meta")
        assert torch.zeros(1).device.type == "meta"
    finally:
        torch.set_default_device(None)
    try:
        one.be_on("cpu")
        assert (torch.get_num_threads(), torch.zeros(1).device.type) == (1, "cpu")
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
def test_arms(arm) -> None:
    """Each is a configuration that is not refused, and differs from what it is compared with."""
    others = {other.name: other for other in ARMS}
    for task in arm.tasks:
        settings = one.settings_of(arm, TASKS[task])
        config = RALConfig(output_dir="unused", use_cpu=True, bf16=False, report_to=[], **settings)
        assert config.needs_teacher == arm.teacher
        assert config.generation_batch_size == ROLLOUTS
        assert all(settings[k] == v for k, v in BUDGET.items() if k not in arm.settings)
        for name in arm.against:
            against = others[name]
            assert task in against.tasks and against.style == arm.style
            assert (arm.settings, arm.control) != (against.settings, against.control)


def _batch(
    plan: one.Plan, name: str, rewards: int = 3, task: str = "frames"
) -> tuple[Engine, Rollouts]:
    """An arm's engine and its first rollout batch, whose rewards differ within groups."""
    arm = next(arm for arm in ARMS if arm.name == name)
    engine = one.Bench.of(plan, TASKS[task], "think").engine(arm, 0, batches=1)
    engine._reward = lambda completions, **_: [n % rewards for n in range(len(completions))]
    return engine, engine.roll_out(torch.arange(16))  # a random start is never right


@pytest.mark.parametrize(("task", "tokens"), [("frames", 4), ("resolution", 1)])
def test_controls_of_evidence(plan, task: str, tokens: int) -> None:
    """The frame or cell after the right one; and good rollouts by the advantages of others."""
    found = {}
    for name in ("evidence", "evidence_wrong", "evidence_shuffled"):
        inputs = _batch(plan, name, task=task)[1].inputs
        visual = [ids.nonzero()[:, 0] for ids in inputs["visual"]]
        places = [
            {int((keys == key).nonzero()) // tokens for key in ids[ids >= 0]}
            for keys, ids in zip(visual, inputs["evidence_ids"], strict=True)
        ]
        good, positive = inputs["evidence_share"] > 0, inputs["advantages"] > 0
        counts = [len(keys) // tokens for keys in visual]
        found[name] = (places, good, positive, counts)
    places, good, positive, counts = found["evidence"]
    assert all(len(each) == 1 for each in places)
    wrong = found["evidence_wrong"][0]
    for right, other, count in zip(places, wrong, counts, strict=True):
        assert other == {(n + 1) % count for n in right}
    assert torch.equal(good, positive) and good.any() and not good.all()
    _, shuffled, own, _ = found["evidence_shuffled"]
    assert not torch.equal(shuffled, own) and shuffled.sum() == own.sum()


def test_rollouts_to_reach_an_accuracy() -> None:
    curve = [[0, 0.1], [2, 0.3], [4, 0.7], [6, 0.6]]
    assert report.rollouts_to(curve, 0.5) == 3 * ROLLOUTS  # between two points a line
    assert report.rollouts_to(curve, 0.05) == 0
    assert report.rollouts_to(curve, 0.3) == 2 * ROLLOUTS
    assert report.rollouts_to(curve, 0.8) is None
    runs = [{**_made_up("evidence", seed, 0.5), "curve": curve[: 4 - seed]} for seed in (0, 2)]
    runs += [_made_up("grpo", 0, 0.5), _made_up("start", 0, 0.5)]  # of the other study
    heads, line = report.reached("frames", runs, 0.5)
    assert heads[2] == "reached 50 %"
    assert line == ["evidence, good rollouts", "2", "1", str(3 * ROLLOUTS)]
    assert report.reached("frames", runs[2:], 0.5) == []


def test_controls_change_what_attention_learns_from_and_nothing_else(
    plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Losses of a policy that has moved, with the attention term and without it."""
    terms, rests = [], []
    for name in ("ral", "ral_flipped", "ral_shuffled"):
        engine, rollouts = _batch(plan, name)
        with torch.no_grad():
            for parameter in engine.policy.parameters():
                parameter.mul_(1.5)
            whole = float(engine.loss(rollouts))
            advantages = rollouts.inputs["advantages"]
            monkeypatch.setattr(engine, "_controlled", torch.zeros_like)
            rests.append(float(engine.loss(rollouts)))
            assert torch.equal(rollouts.inputs["advantages"], advantages)
        terms.append(whole - rests[-1])
    assert terms[1] == pytest.approx(-terms[0], rel=1e-2) and abs(terms[0]) > 1e-5
    assert terms[2] != pytest.approx(terms[0], rel=1e-2)
    assert rests == pytest.approx([rests[0]] * 3)


def test_a_random_reference_differs_in_what_attends_alone(
    plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same entries at other places; and a term that is not 0 at the start of a batch."""
    references, terms = [], []
    for name in ("ral_10_all_ref", "ral_10_all_random"):
        engine, rollouts = _batch(plan, name, task="chain")
        assert engine.reference is not None
        references.append(dict(engine.reference.named_parameters()))
        whole = float(engine.loss(rollouts))
        monkeypatch.setattr(engine, "_controlled", torch.zeros_like)
        terms.append(whole - float(engine.loss(rollouts)))
    for name, weight in references[0].items():
        other = references[1][name]
        assert torch.equal(weight, other) == (not name.endswith("qkv_proj.weight"))
        assert torch.equal(weight.flatten().sort()[0], other.flatten().sort()[0])
    assert terms[0] == 0 and abs(terms[1]) > 1e-6


@pytest.mark.parametrize("task, style, extent, queries", [
    ("frames", "think", 4, 1), ("frames", "direct", 4, 1), ("chain", "think", 6, 8),
    ("chain_cells", "think", 3, 8),
])  # fmt: skip
def test_target_attention_and_sharpening(task, style, extent, queries) -> None:
    """Against the model's own attention maps: the share on the frame that is asked about."""
    import ral_kernels as rk

    model, reader = _model_and_reader(words=WORDS_OF.get(TASKS[task].name, ()))
    decoder = Decoder.of(model)
    watch = TargetAttention(reader, TASKS[task], style, extent, 6)
    inputs = {**watch.prompts.fields}
    shares = watch(decoder)
    maps = model(**inputs, output_attentions=True, use_cache=False).attentions
    granularity = "token" if TASKS[task].axis == "cells" else "frame"
    ids = rk.spans_for(model.config, inputs, granularity).spans.ids
    assert watch.rows.shape == (queries,)
    by_query = watch.of_queries(decoder)
    for share, of_queries, attention in zip(shares, by_query, maps, strict=True):
        wanted = []
        for query, position in enumerate(watch.rows):
            row = attention.mean(1)[:, position]
            visual = (row * (ids >= 0)).sum(-1)
            target = (row * (ids == watch.targets[:, query, None])).sum(-1)
            wanted.append(float((target / visual).mean().detach()))
        assert of_queries.tolist() == pytest.approx(wanted, rel=1e-4)
        assert share == pytest.approx(sum(wanted) / queries, rel=1e-4)
    first, of_tokens = watch.first_text, watch.of_tokens(decoder)
    assert of_tokens.shape[1] == watch.rows[-1] + 1 - first
    for of_rows, attention in zip(of_tokens, maps, strict=True):
        rows = attention.mean(1)[:, first : watch.rows[-1] + 1]
        target = (rows * (ids == watch.targets[:, :1])[:, None]).sum(-1)
        wanted = (target / (rows * (ids >= 0)[:, None]).sum(-1)).mean(0).detach()
        assert of_rows.tolist() == pytest.approx(wanted.tolist(), rel=1e-4)
    with sharpened(decoder, 3.0):
        assert watch(decoder) != pytest.approx(shares, rel=1e-3)
    assert watch(decoder) == pytest.approx(shares)


def test_a_line_for_each_token(plan) -> None:
    """The colour differs from row to row, and has its own name."""
    bench = one.Bench.of(plan, TASKS["resolution"], "think")
    heads, *lines = token_looks.table(bench, bench.model(bench.start), 3)
    assert heads == ["token", "layer 1", "layer 2"]
    names = [line[0] for line in lines]
    assert names[-4:] == ["<think>", "the colour", "</think>", "<answer>"]
    assert names.count("the colour") == 2
    assert all(share.endswith(" %") for line in lines for share in line[1:])


def test_answers_are_those_of_transformers() -> None:
    """Greedy answers to held-out rows, of a model that answers in many ways."""
    model, reader = _model_and_reader(seed=2)
    model.model.visual = reader.pictures.tower
    wanted = evaluate(
        model, "timestamp", extents=(1, 4), size=6, processor=make_processor(),
        seed=TEST_SEED - 1_000,
    )  # fmt: skip
    decoder = Decoder.of(model)
    for extent, score in wanted.items():
        held_out = HeldOut(reader, TASKS["frames"], "think", extent, 6)
        assert held_out(decoder) == score
        model.model.visual = reader.pictures
        fields = held_out.prompts.fields
        whole = model.generate(**fields, do_sample=False, max_new_tokens=12)
        said = held_out.answers(decoder)
        length = fields["input_ids"].shape[1]
        assert torch.equal(whole[:, length : length + said.shape[1]], said)


def test_pictures_are_what_the_tower_makes_of_them() -> None:
    """Numbers in the place of pixels change nothing, and no picture is looked at again."""
    _, reader = _model_and_reader(seed=2)
    held_out = HeldOut(reader, TASKS["frames"], "think", 4, 6)
    rows = TASKS["frames"].rows(6, 4, "test", TEST_SEED, style="think")
    pixels = make_processor().image_processor(
        [image for row in rows for image in row["images"]], return_tensors="pt"
    )
    with torch.no_grad():
        seen = reader.pictures.tower(pixels["pixel_values"], grid_thw=pixels["image_grid_thw"])
    torch.testing.assert_close(held_out.prompts.features, seen.pooler_output)
    assert held_out.prompts.fields["pixel_values"].shape[1] == 1
    assert len(reader.pictures) == 24
    HeldOut(reader, TASKS["frames"], "think", 4, 6)
    assert len(reader.pictures) == 24
    fresh = HeldOut(reader, TASKS["frames"], "think", 4, 6, seed=TEST_SEED + 10)
    assert len(reader.pictures) == 48
    assert fresh._solutions != held_out._solutions


def _model_and_reader(seed: int = 0, words: tuple[str, ...] = ()) -> tuple[Any, Reader]:
    tokenizer = make_tokenizer(words)
    model = make_model(attn_implementation="eager", seed=seed, tokenizer=tokenizer)
    return model, Reader(model, make_processor(tokenizer))


def test_statistics() -> None:
    # Student's t for 4 degrees of freedom: 2.776; the standard error of 1..5 is sqrt(0.5)
    found = estimate([1.0, 2.0, 3.0, 4.0, 5.0])
    assert (found.mean, found.seeds) == (3.0, 5)
    assert found.half_width == pytest.approx(2.7764 * math.sqrt(0.5), rel=1e-4)
    assert math.isnan(estimate([0.5]).half_width)
    difference = paired({0: 0.5, 1: 0.7, 2: 0.1}, {1: 0.6, 2: 0.2, 9: 1.0})
    assert difference is not None and difference.seeds == 2
    assert difference.mean == pytest.approx(0.0)
    assert paired({0: 1.0}, {1: 1.0}) is None
    assert estimate([0.1, 0.1]).p == 0.0 and estimate([0.0, 0.0]).p == 1.0
    # one sample of 5 against 0: t = 3 / sqrt(0.5) = 4.243, two-sided p = 0.0132
    assert found.p == pytest.approx(0.0132, abs=1e-4)
    assert deviation([1.0, 3.0]) == pytest.approx(math.sqrt(2)) and math.isnan(deviation([1.0]))
    assert estimate([0.02, 0.04]).signed.startswith("+3.0 ± ")
    assert estimate([-0.02, -0.04]).signed.startswith("−3.0 ± ")


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    left_alone = holm([math.nan, 0.02])
    assert math.isnan(left_alone[0]) and left_alone[1] == 0.02


_SETTINGS = {"start_seed": 0, "first_seed": 0, "seeds": 2, "batches": None, "test_rows": 8}


def _made_up(arm: str, seed: int, right: float, sharp: float = 0.5, of: str = "frames") -> dict:
    task = TASKS[of]
    sizes = {str(n): right for n in task.evaluated}
    return {
        "task": of, "arm": arm, "seed": seed, "accuracy": {**sizes, "1": 1.0},
        "sharpened": dict.fromkeys(map(str, task.endpoint), sharp),
        "target": {size: [0.1, right] for size in sizes}, "curve": [[5, right - 0.1]],
        "thought": dict.fromkeys(sizes, 0.25), "target_curve": [[0, [0.1, 0.2]], [5, [0.1, right]]],
        "reward_curve": [0.0, 0.1, 0.2, right], "attn/differing_prefixes": [0.5, 0.7],
        "attn/grad_share": [0.0, 2 * right] if "ral" in arm else [],
    }  # fmt: skip


def test_the_endpoint_is_a_mean_over_sizes_beyond_training() -> None:
    for task in TASKS.values():
        assert min(task.endpoint) > max(task.trained)
        assert set(task.endpoint) <= set(task.evaluated)
    of_extent = {"1": 1.0, "16": 0.9, "32": 0.6, "64": 0.3}
    assert TASKS["frames"].at_endpoint(of_extent) == pytest.approx(0.6)


def test_tables() -> None:
    runs = [_made_up("start", 0, 0.3)]
    runs += [_made_up("grpo", seed, right) for seed, right in enumerate((0.7, 0.8, 0.75))]
    runs += [_made_up("ral", seed, right) for seed, right in enumerate((0.72, 0.84, 0.78))]
    runs += [_made_up("logits", seed, 0.8) for seed in range(2)]
    runs += [_made_up("opad", seed, right) for seed, right in enumerate((0.82, 0.84))]
    heads, *lines = report.table("frames", runs)
    cells = {line[0]: dict(zip(heads, line, strict=True)) for line in lines}
    assert list(cells) == [report.label_of(a) for a in ("start", "grpo", "ral", "logits", "opad")]
    assert cells["GRPO"]["endpoint"].startswith("75.0 ± 12.4") and cells["GRPO"]["SD"] == "5.0"
    assert cells["GRPO"]["1"] == "100.0" and cells["GRPO"]["scores × 1.4"].startswith("50.0")
    assert cells["start (SFT)"]["endpoint"] == "30.0" and cells["start (SFT)"]["SD"] == ""
    _, ral, opad = report.comparisons("frames", runs)
    assert ral[:4] == ["RAL λ = 5, all layers", "GRPO", "3", "+3.0 ± 2.5"]
    # p of t = 3 / (1 / sqrt 3) with 2 degrees of freedom is 0.035; two comparisons
    assert (ral[4], ral[5]) == ("0.035", "0.070")
    assert opad[1] == "distillation of tokens"
    _, early, late = report.curves("frames", runs)
    assert early[0] == "5" and early[3].startswith("+3.0") and late[0] == "the end"
    assert "| 3 | +3.0 ± 2.5 |" in report.markdown([ral])
    _, start, grpo, ral, *_ = report.training("frames", runs)
    assert start == ["start (SFT)", "", "", "25", "", ""]
    assert grpo[1:5] == ["60", "", "25", "0.75"] and grpo[5].startswith("75.0 ± 12.4")
    assert ral[2] == "0.72 to 0.84"  # of each run the mean, the lowest and the highest


def test_tables_go_to_their_place_in_a_document(tmp_path) -> None:
    study = {
        "settings": _SETTINGS,
        "commit": {"hash": "0123456789", "dirty": False},
        "runs": [_made_up(arm, seed, 0.5) for arm in ("grpo", "ral") for seed in range(2)],
    }
    file, document = tmp_path / "study.json", tmp_path / "document.md"
    file.write_text(json.dumps(study))
    place = "<!-- tables: python -m benchmarks.study.report x -->"
    document.write_text(f"before\n\n{place}\nold\n<!-- end of tables -->\nafter\n")
    for _ in range(2):  # twice the same
        assert report.main(["--into", str(document), str(file)]) == 0
        text = document.read_text()
        assert text.startswith(f"before\n\n{place}\n\n### frames, seeds 0 to 1\n")
        assert text.endswith("<!-- end of tables -->\nafter\n") and "old" not in text
        assert text.count("\n| GRPO | 2 |") == 1 and "20 rollout batches" in text
    document.write_text("no place")
    with pytest.raises(ValueError, match="must have lines"):
        report.insert(document, [file])


def test_seeds_of_two_studies_are_pooled(tmp_path) -> None:
    study = {
        "settings": _SETTINGS,
        "commit": {"hash": "0123456789", "dirty": False},
    }
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for number, (file, other) in enumerate(zip(files, ("noise", "ral_ref"), strict=True)):
        seeds = range(100 * number, 100 * number + 2)
        runs = [_made_up("grpo", seed, 0.5) for seed in seeds]
        runs += [_made_up("ral", seed, 0.6) for seed in seeds]
        runs += [_made_up(other, seed, 0.7) for seed in seeds]
        file.write_text(json.dumps({**study, "runs": runs}))
    head, body = report.pooled("frames", files)
    assert (
        "all seeds" in head
        and head.endswith("commit 0123456789\n")
        and "| GRPO | 4 | +10.0 ± 0.0 |" in body
    )
    assert "noise" not in body and "from the start" not in body  # in one study alone
    (table,) = report.difference("ral", "grpo", files)
    assert "| endpoint | +10.0 ± 0.0 | 4 |" in table and "| 64 | +10.0" in table
    for setting in ("test_rows", "start_seed"):
        changed = {**study, "settings": {**_SETTINGS, setting: 16}, "runs": runs}
        files[1].write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="one start and size"):
            list(report.pooled("frames", files))
    text = "\n".join(report._all(files))  # from two starts: not one sample
    assert "from start 16" in text and "all seeds" not in text


def test_a_study_of_another_task_is_not_pooled(tmp_path) -> None:
    files = []
    for number, task in enumerate(("frames", "frames", "resolution")):
        seed = 10 * number
        runs = [_made_up(arm, seed, 0.5, of=task) for arm in ("grpo", "ral")]
        settings = {**_SETTINGS, "first_seed": seed, "seeds": 1}
        files.append(tmp_path / f"{number}.json")
        commit = {"hash": f"012345678{number}", "dirty": False}
        files[-1].write_text(json.dumps({"settings": settings, "commit": commit, "runs": runs}))
    text = "\n".join(report._all(files))
    assert text.count("all seeds") == 1 and "### frames, all seeds" in text
    assert "in 2 studies, commits 0123456780 and 0123456781\n" in text


def test_a_panel_without_its_own_arms_shows_those_there_are() -> None:
    own = {arm: {0: _made_up(arm, 0, 0.5)} for arm in ("start", "grpo", "ral", "noise", "ral_ref")}
    assert plot._shown(plot._GAIN, own) == ["ral", "noise"]
    others = {arm: own[arm] for arm in ("start", "grpo", "ral_ref")}
    assert plot._shown(plot._GAIN, others) == ["grpo", "ral_ref"]
    assert plot._shown(plot._ACCURACY, others) == ["start", "grpo", "ral_ref"]
    assert plot._style_of("ral_ref") != plot._style_of("ral_frame")


def test_a_picture_of_the_tasks(tmp_path) -> None:
    assert 10_000 < task_pictures.draw(tmp_path / "tasks.png").stat().st_size < 200_000


@pytest.mark.slow(stands_in="test_distillation_is_watched_while_it_trains")
def test_a_study(plan, tmp_path: Path, capsys) -> None:
    arms = ["grpo", "ral", "sum"]  # the last one is of the study of objectives
    for arm in arms:
        result = one.run(plan, "frames", arm, 0)
        assert set(result["accuracy"]) == {str(size) for size in TASKS["frames"].evaluated}
        assert set(result["sharpened"]) == {str(size) for size in TASKS["frames"].endpoint}
        assert all(
            0 <= x <= 1 for x in [*result["accuracy"].values(), *result["grounded"].values()]
        )
        assert [done for done, _ in result["target_curve"]] == [0, 1]
    before = plan.result("frames", "ral", 0).stat().st_mtime_ns
    arguments = ["--tasks", "frames", "--arms", *arms, "--seeds", "1", "--batches", "1"]
    arguments += ["--test-rows", "2", "--workers", "1", "--runs", str(plan.folder)]
    assert figure3.main([*arguments, "--out", str(tmp_path)]) == 0
    assert plan.result("frames", "ral", 0).stat().st_mtime_ns == before  # runs are not repeated
    (file,) = tmp_path.glob("*.json")
    study = json.loads(file.read_text())
    assert [run["arm"] for run in study["runs"]] == ["start", *arms]
    (picture,) = tmp_path.glob("*.png")
    assert picture.name == f"{file.stem}-frames.png" and picture.stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "reached 50 %" in printed and "evidence on all, reward, credit" in printed
    assert "RAL λ = 5, all layers" in printed and "mean of 16, 32 and 64 frames" in printed
    assert report.main([str(file)]) == 0
    assert "| GRPO | 1 |" in capsys.readouterr().out


def test_distillation_is_watched_while_it_trains(plan) -> None:
    result = one.run(plan, "resolution", "opad", 0)
    assert [done for done, _ in result["curve"]] == [1]
    assert len(result["target_curve"][0][1]) == 2  # layers


@pytest.mark.slow(stands_in="test_distillation_is_watched_while_it_trains")
def test_a_teacher_is_the_start_after_training(tmp_path) -> None:
    from ral.models import load_model

    plan, task = one.Plan(tmp_path, 1, 2, start_steps=0), TASKS["frames"]
    start, teacher = (
        load_model(str(folder), dtype="float32").state_dict()
        for folder in (one.make_start(plan, task, "think"), one.make_teacher(plan, task))
    )
    assert start.keys() == teacher.keys()
    for name, weight in teacher.items():
        assert torch.equal(weight, start[name]) == (".visual." in name), name
    bench = one.Bench.of(plan, task, "think")
    assert all(map(torch.equal, bench.model(plan.teacher(task)).weights().values(),
                   (teacher[name] for name in bench.model(bench.start).weights())))  # fmt: skip


def test_quick_arms_have_what_they_are_compared_with() -> None:
    by_name = {arm.name: arm for arm in ARMS}
    for name in QUICK:
        assert set(by_name[name].against) <= set(QUICK)
