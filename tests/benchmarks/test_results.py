"""A benchmark leaves the tree clean unless it is asked to commit what it writes."""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from benchmarks import frames_sweep, policy_divergence_accuracy
from benchmarks.harness import machine, results

ROOT = Path(__file__).resolve().parents[2]
# Every script that writes files by default.
WRITERS = (
    "attention_bench",
    "decode_bench",
    "figure3",
    "frames_sweep",
    "policy_divergence_accuracy",
    "policy_divergence_bench",
    "resolution_sweep",
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
    assert "--commit-results" in printed and "--out" in printed
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


@pytest.mark.slow(stands_in="tests/benchmarks/test_sweeps.py::test_frames_sweep_on_pictures")
def test_a_sweep_draws_beside_its_json(folders: Path) -> None:
    options = ["--heads", "2", "--kv-heads", "1", "--head-dim", "8", "--frames", "2"]
    options += ["--grid", "2", "2", "--input", "random", "--dtype", "float32", "--repeats", "1"]
    options += ["--no-backward", "--layouts", "none", "--contestants", "ral"]
    assert frames_sweep.main(options) == 0
    assert {path.suffix for path in (folders / "local").iterdir()} == {".json", ".png"}
