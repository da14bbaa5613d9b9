"""Where benchmarks write and under which names, what they say of time and load, and their list."""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import frames_sweep, policy_divergence_accuracy
from benchmarks.harness import commands, machine, results

ROOT = Path(__file__).resolve().parents[2]
# Every script that writes files by default.
WRITERS = (
    "attention_bench",
    "call_cost",
    "decode_bench",
    "figure3",
    "frames_sweep",
    "launch_cost",
    "output_hashes",
    "policy_divergence_accuracy",
    "policy_divergence_bench",
    "resolution_sweep",
    "study_speed",
    "target_bench",
    "train_overhead",
    "transformers_memory",
)
SMALL = ["--batch", "1", "--rows", "4", "--seqlen", "16", "--heads", "2", "--kv-heads", "1"]


@pytest.mark.parametrize("name", WRITERS)
def test_every_writer_has_the_options(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as ended:
        module.main(["--help"])
    assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "--commit-results" in printed and "--out" in printed and "--quick" in printed
    with pytest.raises(SystemExit):
        module.main(["--commit-results", "--out", "folder"])
    assert "not allowed with" in capsys.readouterr().err


def test_one_place_decides() -> None:
    """All but codegen, whose tables are committed on purpose."""
    other = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "benchmarks").rglob("*.py")
        if '/ "results"' in path.read_text() and "codegen" not in path.parts
    ]
    assert other == ["benchmarks/harness/results.py"]


@pytest.mark.skipif(shutil.which("git") is None, reason="no git")
def test_git_ignores_the_default_folder() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("a tree without git")

    def ignored(path: Path) -> bool:
        return subprocess.run(["git", "-C", ROOT, "check-ignore", "-q", path]).returncode == 0

    assert ignored(results.LOCAL / "any.json")
    assert not ignored(results.RESULTS / "some-machine" / "any.json")


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(results, "LOCAL", tmp_path / "local")
    return tmp_path


def written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file())


def test_a_bench_writes_where_it_is_told(folders: Path) -> None:
    small = [*SMALL, "--head-dim", "8", "--dtypes", "float32"]
    assert policy_divergence_accuracy.main(small) == 0
    assert written(folders) == ["local"]
    assert policy_divergence_accuracy.main([*small, "--commit-results"]) == 0
    (run,) = (folders / "local").glob("*.json")
    of_machine = machine.slug(json.loads(run.read_text())["machine"])
    assert written(folders) == sorted(["local", of_machine])
    assert policy_divergence_accuracy.main([*small, "--out", str(folders / "mine")]) == 0
    assert written(folders) == sorted(["local", "mine", of_machine])


def test_names_hold_settings_and_processor_and_repeats_overwrite_nothing(folders: Path) -> None:
    small = [*SMALL, "--head-dim", "8", "--dtypes", "float32", "--out", str(folders)]
    for _ in range(3):
        assert policy_divergence_accuracy.main(small) == 0
    files = sorted(folders.glob("*.json"), key=lambda file: (len(file.stem), file.stem))
    first, *more = [file.stem for file in files]
    assert more == [f"{first}-2", f"{first}-3"]
    facts = json.loads(files[0].read_text())["machine"]
    assert f"-{facts['cpu_id']}-{facts['threads']}t-" in first
    assert first.startswith("policy_divergence_accuracy-dtypes-float32-batch-1-rows-4-seqlen-16")


def test_machines_of_one_marketing_name_have_folders_of_their_own() -> None:
    one, other = (
        {"cpu": "A CPU", "cpu_id": f"intel-6-{x}", "cores": 2} for x in ("167-1", "207-8")
    )
    assert machine.slug(one) == "a-cpu-6-167-1-2-cores" != machine.slug(other)


def options_of(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    results.add_arguments(parser, quick="less")
    parser.add_argument("--size", type=int, nargs="+", default=[1])
    return results.parse(parser, arguments)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ""),
        (["--quick"], "quick"),
        (["--size", "3", "4", "--out", "folder"], "size-3-4"),
        (["--size", *map(str, range(40))], None),
    ],
    ids=["defaults", "quick", "list", "long"],
)
def test_settings_in_a_name(arguments: list[str], named: str | None) -> None:
    found = options_of(*arguments).named
    if named is not None:
        assert found == named
    else:  # cut, with a hash of all
        assert len(found) == results.LONGEST + 9
        assert found != options_of(*arguments, "41").named


def begun(*arguments: str) -> dict[str, Any]:
    return results.begin("attention_bench", options_of(*arguments), {})


def test_the_time_that_a_run_takes_is_said_before_it(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (documented,) = (r for r in commands.table() if r.command.endswith("attention_bench"))
    assert begun()["expected_seconds"] == 60 * float(documented.minutes.split()[0])
    assert "by benchmarks/README.md" in capsys.readouterr().out
    assert begun("--quick")["expected_seconds"] == commands.QUICK_SECONDS
    capsys.readouterr()
    run = begun("--size", "64")
    assert run["expected_seconds"] is None and "with other size" in capsys.readouterr().out
    options = options_of("--size", "64")
    options.began -= 42
    results.finish(run, options)
    assert begun("--size", "64")["expected_seconds"] == pytest.approx(42, abs=2)
    assert f"s, as at {run['commit']['hash']}" in capsys.readouterr().out
    options.began -= 1000
    results.finish({**run, "expected_seconds": 42.0}, options)
    assert "x the 42 s it should take" in capsys.readouterr().out
    results.finish({**run, "expected_seconds": 0.0}, options)  # of a run below 0.05 s
    assert "should take" not in capsys.readouterr().out


@pytest.mark.parametrize("busy", [False, True])
def test_load_is_recorded_and_warned_about(
    busy: bool, folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(machine, "load", lambda: 99.0 if busy else 0.1)
    run = begun()
    assert ("load average 99.0 before the run" in capsys.readouterr().out) == busy
    results.finish(run, options_of())
    assert ("load average 99.0 after the run" in capsys.readouterr().out) == busy
    (file,) = (folders / "local").glob("*.json")
    assert json.loads(file.read_text())["load"] == dict.fromkeys(
        ("before", "after"), machine.load()
    )


def test_lists_of_numbers_take_a_line(tmp_path: Path) -> None:
    run = {"ms": [1.5, -2e-05, 3.0], "names": ["a", "b"], "empty": [], "rows": [{"x": [1, 2]}]}
    results.save(run, tmp_path / "run.json")
    text = (tmp_path / "run.json").read_text()
    assert json.loads(text) == run
    assert "[ 1.5, -2e-05, 3.0 ]" in text and '"a",\n' in text


def test_the_list_of_commands() -> None:
    """The README's table, which `python -m benchmarks` prints, has every benchmark."""
    listed = {row.command.split("benchmarks.")[-1].split(",")[0]: row for row in commands.table()}
    missing = [name for name in (*WRITERS, "memory_per_gpu") if name not in listed]
    assert not missing
    assert all(listed[name].quick != "no" for name in WRITERS)
    assert "not recorded with the engine; --quick: 1.1" in commands.listing()
    assert commands.seconds("figure3", True) == pytest.approx(66)
    assert commands.seconds("call_cost", True) == 60
    whole = subprocess.run(
        [sys.executable, "-m", "benchmarks"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    for row in commands.table():
        assert row.question in whole and row.command in whole and row.minutes in whole
    wrong = subprocess.run([sys.executable, "-m", "benchmarks", "nothing"], cwd=ROOT)
    assert wrong.returncode == 2


@pytest.mark.slow(
    stands_in="tests/benchmarks/test_sweeps.py::test_without_time_the_peer_is_measured_and_the_rest_say_why"
)
def test_a_sweep_draws_beside_its_json(folders: Path) -> None:
    options = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--frames", "2"]
    options += ["--grid", "2", "2", "--input", "random", "--dtype", "float32", "--repeats", "1"]
    options += ["--no-backward", "--layouts", "none", "--contestants", "ral"]
    assert frames_sweep.main(options) == 0
    assert {path.suffix for path in (folders / "local").iterdir()} == {".json", ".png"}
