"""The fixed hypotheses about chains: their arms, the order of runs, and what is compared."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.study import confirm, plot
from benchmarks.study.arms import BY_NAME
from benchmarks.study.confirm import SEEDS, STARTS, STUDIES, Hypothesis, Study
from benchmarks.study.evaluate import TEST_SEED
from benchmarks.study.report import by_arm
from benchmarks.study.statistics import estimate

ROOT = Path(__file__).resolve().parents[2]
_TWO = replace(
    STUDIES["chain"],
    hypotheses=(
        Hypothesis("ral_1_last", "grpo", (-1, 2)), Hypothesis("opad", "logits", (1, 4), mark=0)
    ),
)  # fmt: skip


@pytest.mark.parametrize("study", STUDIES.values(), ids=STUDIES)
def test_hypotheses_are_of_fresh_seeds_starts_and_rows(study: Study) -> None:
    assert len(study.hypotheses) <= 4 and len(SEEDS) >= 20 and len(STARTS) == 2
    assert min(SEEDS) >= 2000 and 0 not in STARTS and study.test_seed != TEST_SEED
    for one in study.hypotheses:
        for arm in map(BY_NAME.__getitem__, (one.arm, one.against)):
            assert study.task.name in arm.tasks and (one.mark is None or arm.curve)
        assert one.predicted[0] < one.predicted[1]


def test_any_prefix_of_the_runs_is_balanced(tmp_path: Path) -> None:
    planned = [(plan.start_seed, arm, seed) for plan, arm, seed in _TWO.jobs(tmp_path)]
    each = len(STARTS) * len(_TWO.arms())
    assert _TWO.arms() == ["grpo", "ral_1_last", "logits", "opad"]
    assert len(set(planned)) == len(planned) == len(SEEDS) * each
    for number, seed in enumerate(SEEDS):
        assert {n for _, _, n in planned[number * each : (number + 1) * each]} == {seed}
    assert len({plan.folder for plan, _, _ in _TWO.jobs(tmp_path)}) == len(STARTS)


def test_nothing_is_compared_before_all_runs_are_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Differences of both starts are one value of a seed."""
    monkeypatch.setitem(STUDIES, "chain", _TWO)
    gains = {}
    last = None
    for plan, arm, seed in _TWO.jobs(tmp_path):
        gain = 0.01 * (seed % 7) + 0.021 * (plan.start_seed == 1)
        gains[plan.start_seed, seed] = gain
        right = 0.3 + gain * (arm == "ral_1_last")
        early = 0.1 + 0.05 * (arm == "opad") + 0.002 * (seed % 2) * (arm == "opad")
        last = plan.result("chain", arm, seed)
        last.parent.mkdir(parents=True, exist_ok=True)
        last.write_text(
            json.dumps(
                {
                    "arm": arm,
                    "seed": seed,
                    "accuracy": {"24": right, "32": right},
                    "curve": [[16, early], [32, 0]],
                }
            )
        )
    assert last is not None
    kept = last.read_text()
    last.unlink()
    assert confirm.main(["report", str(tmp_path)]) == 1
    assert "159 of 160 runs are there" in capsys.readouterr().out
    last.write_text(kept)
    written = tmp_path / "runs.jsonl"
    assert confirm.main(["report", str(tmp_path), "--json", str(written)]) == 0
    assert len(set(written.read_text().splitlines())) == 160
    lines = capsys.readouterr().out.splitlines()
    wanted = estimate(
        [sum(gains[start, seed] for start in STARTS) / len(STARTS) for seed in SEEDS]
    ).signed
    assert f"| {len(SEEDS)} | {wanted} |" in lines[2] and "+5.1" in lines[3]
    for start in STARTS:
        assert estimate([gains[start, seed] for seed in SEEDS]).signed in lines[2]
    assert not any("start 1: right" in line for line in lines)
    for plan in _TWO.plans(tmp_path):
        made = {"accuracy": {"24": 0.2, "32": 0.4}, "target": {"24": [0, 0.5], "32": [0, 0.3]}}
        plan.result("chain", "start", 0).write_text(json.dumps(made))
    assert confirm.main(["report", str(tmp_path)]) == 0
    *_, means = capsys.readouterr().out.split("\n\n")
    heads, _, of_start, grpo, *_ = means.splitlines()
    assert "start 1: right | start 1: attention" in heads
    assert of_start.endswith("| 30.0 | 40.0 | 30.0 | 40.0 |")
    assert grpo.endswith("| 30.0 |  | 30.0 |  |")


def test_runs_are_made_in_their_order_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    monkeypatch.setitem(STUDIES, "chain", replace(_TWO, hypotheses=_TWO.hypotheses[:1]))
    for name in ("make_start", "make_teacher"):
        monkeypatch.setattr(
            confirm, name, lambda plan, *_, name=name: made.append(f"{name} {plan.start_seed}")
        )
    monkeypatch.setattr(confirm, "be_quiet", lambda: None)
    monkeypatch.setattr(confirm, "SEEDS", range(2000, 2002))

    def run(plan, task, arm, seed):
        made.append(f"{arm} {plan.start_seed} {seed}")
        return {"cpu_seconds": 1.0, "accuracy": {"24": 0.2, "32": 0.3}}

    monkeypatch.setattr(confirm, "run", run)
    assert confirm.main(["run", str(tmp_path)]) == 0
    first = [f"{what} {start}{seed}" for start in STARTS
             for what, seed in (("make_start", ""), ("start", " 0"))]  # fmt: skip
    assert made[:4] == first
    assert made[4:] == [f"{arm} {start} {seed}" for seed in (2000, 2001)
                        for start in STARTS for arm in ("grpo", "ral_1_last")]  # fmt: skip
    made.clear()
    monkeypatch.setitem(STUDIES, "other", _TWO)
    assert confirm.main(["run", str(tmp_path), "--task", "other"]) == 0
    assert [what for what in made if "teacher" in what] == [f"make_teacher {n}" for n in STARTS]
    made.clear()
    assert confirm.main(["run", str(tmp_path), "--start", "2"]) == 0
    assert made == ["make_start 2", "start 2 0"] + [
        f"{arm} 2 {seed}" for seed in (2000, 2001) for arm in ("grpo", "ral_1_last")
    ]


def test_the_picture_has_the_differences_of_the_report(tmp_path: Path) -> None:
    """From the committed runs: the mean over the endpoint and both starts is the report's."""
    from matplotlib.figure import Figure

    kept = ROOT / "benchmarks/results/amd-epyc-2-cores/chain-confirm-47d2ac1.jsonl"
    runs = [{"task": "chain", **json.loads(line)} for line in kept.read_text().splitlines()]
    study = STUDIES["chain"]
    at = [study.task.evaluated.index(extent) for extent in study.task.endpoint]
    gains = []
    for start in STARTS:
        axes: Any = Figure().subplots()
        of = by_arm([run for run in runs if run["start"] == start], "chain")
        plot._gain_of_each(axes, study.task, of)
        lines = {c.get_label(): c.lines[0].get_ydata() for c in axes.containers}
        assert len(lines) == 4
        gains += [lines["RAL λ = 30, all layers − GRPO"][n] for n in at]
    by_key = {(arm, start): {r["seed"]: r for r in runs if (r["arm"], r["start"]) == (arm, start)}
              for arm in ("grpo", "ral_30_all") for start in STARTS}  # fmt: skip
    wanted = study.difference(study.hypotheses[1], by_key)
    assert wanted is not None and sum(gains) / 4 == pytest.approx(100 * wanted.mean)
    copy = tmp_path / kept.name
    copy.write_text(kept.read_text())
    assert plot.draw_starts(copy).stat().st_size > 20_000
