"""The GPU scripts without a GPU: what becomes of a stage, a worker, a test that goes wrong."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import compilers, mock, points, profile, sanitizer, scripts, stages, work
from benchmarks.gpu.__main__ import main, run_stages
from benchmarks.gpu.lines import STICKY, append, parsed
from benchmarks.gpu.points import Point, Unit
from benchmarks.gpu.scripts import BEGIN, SCRIPTS, SECONDS, SWEEPS
from benchmarks.gpu.stages import Setting, Stage
from benchmarks.gpu.supervise import PLANS, Supervisor
from benchmarks.problems.attention import ATTENTION
from ral_kernels.runtime import cuda_library, native, triton_runtime
from tests.conftest import skip_or_fail

ROOT = Path(__file__).resolve().parents[2]


def needs_ral_cuda() -> None:
    """Mocked, its kernels run nowhere, but the library must load."""
    reason = native.why_missing("ral_cuda")
    if reason is not None:
        skip_or_fail("cuda", reason)


def python(code: str) -> Any:
    return lambda setting: [sys.executable, "-c", code]


def setting_of(folder: Path, budget: float = math.inf, rehearse: bool = False) -> Setting:
    state, carried = folder / "state", folder / "kit"
    return Setting(folder / "out", folder / "scratch", budget, rehearse, state, carried)


def records_of(folder: Path, script: str = "first") -> dict[str, Any]:
    run = json.loads((folder / "out" / f"gpu-{script}.json").read_text())
    return {record["stage"]: record for record in run["stages"]}


# -- scripts and stages ----------------------------------------------------------------------------


@pytest.mark.slow(stands_in="test_a_worker_on_a_mocked_gpu")
@pytest.mark.long
def test_a_script_on_a_mocked_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Real stages, processes and files: the kit is missing, a kernel crashes, one is wrong."""
    if not triton_runtime._installed():
        skip_or_fail("triton", "triton is not installed")
    needs_ral_cuda()
    faults = [
        {"kernel": "cuda policy_divergence loss", "kind": "crash"},
        {"kernel": "hopper attention bwd", "kind": "wrong"},
    ]
    given = ["--rehearse", "--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(mock.VARIABLE, json.dumps({"faults": faults}))
        given += ["--kit", str(tmp_path / "no-kit"), "--seconds", "900"]
        status = main(["second", *given, "--stages", "correctness hopper", "memcheck"])
    printed = capsys.readouterr().out
    records = records_of(tmp_path, "second")
    assert status == 1, printed
    assert records["correctness hopper"]["status"] == "failed", printed
    outcomes = records["correctness hopper"]["result"]["outcomes"]
    assert outcomes.keys() == {"failed"}, "the gate of every test sees wrong gradients"
    assert records["memcheck"]["result"]["ran"], printed
    assert records["memcheck"]["status"] == "failed"  # the share with the crash
    names = [path.name for path in (tmp_path / "out").iterdir()]
    assert sorted(names) == ["gpu-second.json", "gpu-second.tar.xz"], "few files come back"
    with tarfile.open(tmp_path / "out" / "gpu-second.tar.xz") as archive:
        assert {"gpu.log", "lines.jsonl"} <= set(archive.getnames())
    run = json.loads((tmp_path / "out" / "gpu-second.json").read_text())
    assert run["rehearsal"] == {"faults": faults}
    assert {"versions", "commit", "started", "seconds"} <= run.keys()
    failed = [record["point"] for record in run["points"] if record["part"] == "tests"]
    assert failed and all("test_attention.py" in name for name in failed)
    assert (tmp_path / "state" / "records-second.jsonl").read_text().count("\n") == len(failed)


def test_budgets_fit() -> None:
    """What the stages may take fits into the scripts, and these into fifteen minutes."""
    for name, seconds in SECONDS.items():
        planned = sum(stage.budget for stage in SCRIPTS[name])
        # the library is built only where the kit's does not load, and the kit unpacked once
        spare = sum(stage.budget for stage in BEGIN[name == "first" :])
        assert planned - spare <= seconds - gpu.RESERVE, name
    assert sum(SECONDS.values()) <= 900 - 150  # a machine starts, and waits between commands


def test_commands_of_a_real_run(tmp_path: Path) -> None:
    """What would be run on a GPU is well formed: options that the scripts know."""
    from benchmarks.harness import runner

    for limit in (100.0, math.inf):
        setting = setting_of(tmp_path, limit)
        for plan in SWEEPS:
            command = plan.command(setting)
            parser = argparse.ArgumentParser()
            parser.add_argument("--frames", type=int, nargs="+")
            parser.add_argument("--grid", type=int, nargs=2)
            runner.add_arguments(parser)
            assert command[1:3] == ["-m", "benchmarks.frames_sweep"]
            options = parser.parse_args(command[3:])
            assert options.device == "cuda" and options.dtype == "bfloat16"
            assert options.input == "random", "transformers may be missing there"
            assert 256 * max(options.frames) == 65536
            assert options.budget < max(setting.budget, 3601)
        for stage in SCRIPTS["all"]:
            assert all(isinstance(word, str) for word in stage.command(setting))
    names = [stage.name for stage in SCRIPTS["all"]]
    assert len(set(names)) == len(names)


def test_to_form_a_command_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library that a stage would build anew stays until the command runs."""
    library = tmp_path / "libral_cuda.so"
    library.write_text("old")
    monkeypatch.setattr(scripts, "LIBRARY", library)
    for stage in SCRIPTS["all"]:
        stage.command(setting_of(tmp_path, 100.0))
    assert library.read_text() == "old"


def test_stages_are_isolated(tmp_path: Path) -> None:
    """A crash, a hang and an absent result are recorded, and the stages after them run."""
    hang = "import subprocess, sys, time; print('hanging', flush=True); "
    hang += "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)']); "
    hang += "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"

    def result(setting: Setting) -> Any:
        return json.loads((setting.scratch / "result.json").read_text())

    given = [
        Stage("raises", 1000, python("print('before'); raise KeyError('why')")),
        Stage("dies", 1000, python("import os; os.abort()")),
        Stage("hangs", 3, python(hang)),
        Stage("tells nothing", 1000, python("pass"), result),
        Stage("is not possible", 1000, python("pass"), missing=lambda setting: "a tool is missing"),
        Stage("works", 1000, python("print('fine')"), lambda setting: {"answer": 42}),
    ]
    monkey = pytest.MonkeyPatch()
    monkey.setattr(stages, "GRACE", 0.5)
    with monkey.context():
        assert run_stages("first", given, setting_of(tmp_path, 1000)) == 1
    records = records_of(tmp_path)
    statuses = {name: record["status"] for name, record in records.items()}
    assert statuses == {
        "raises": "failed",
        "dies": "failed",
        "hangs": "out of time",
        "tells nothing": "failed",
        "is not possible": "skipped",
        "works": "ok",
    }
    assert records["raises"]["output"][0] == "before"
    assert "KeyError: 'why'" in records["raises"]["output"][-1]
    assert records["dies"]["exit"] < 0
    assert records["hangs"]["output"] == ["hanging"]
    assert records["hangs"]["seconds"] < 600  # what it would sleep
    assert "FileNotFoundError" in records["tells nothing"]["reason"]
    assert records["works"]["result"] == {"answer": 42}
    with tarfile.open(tmp_path / "out" / "gpu-first.tar.xz") as archive:
        printed = archive.extractfile("gpu.log")
        assert printed is not None
        text = printed.read().decode()
    assert "KeyError" in text and "fine" in text


def test_ends_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last stages go without when the first took long, and each gets what the others left."""
    now = 100.0

    def run(stage: Stage, setting: Setting, log: Path) -> dict[str, Any]:
        nonlocal now
        now += 13.0
        return {"stage": stage.name, "status": "ok", "budget": setting.budget}

    monkeypatch.setattr(gpu, "run", run)
    monkeypatch.setattr(gpu, "time", argparse.Namespace(monotonic=lambda: now))
    given = [Stage(str(i), budget, python("")) for i, budget in enumerate((10, 10, 4, 4))]
    assert run_stages("first", given, setting_of(tmp_path, 35 + gpu.RESERVE)) == 0
    records = records_of(tmp_path)
    assert records["0"]["budget"] == 12.5  # 35 shared out as 10, 10, 4, 4
    assert records["1"]["budget"] == pytest.approx((35 - 13) * 10 / 18)
    assert records["2"]["status"] == records["3"]["status"] == "skipped"
    assert records["3"]["reason"] == "no time left"
    now = 100.0
    assert run_stages("first", given, setting_of(tmp_path)) == 0
    assert all(record["budget"] == math.inf for record in records_of(tmp_path).values())


def test_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit):
        main(["first", "--out", str(tmp_path / "out")])
    assert "torch sees no GPU here (--rehearse" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit):
        main(["first", "--out", str(tmp_path), "--rehearse", "--stages", "nothing"])
    assert "unknown" in capsys.readouterr().err


# -- points, workers, supervisor -------------------------------------------------------------------

TOY_WORKER = """
import json, os, sys, time
sys.path.insert(0, {root!r})
from benchmarks.gpu.lines import STICKY, append
from pathlib import Path
unit, lines = json.loads(open(sys.argv[1]).read()), Path(sys.argv[2])
open(sys.argv[2] + ".pid", "w").write(str(os.getpid()))
if unit["name"] == "never begins":
    print("no such module"); sys.exit(3)
for point in unit["points"]:
    append(lines, {{"event": "begin", "unit": unit["name"], "point": point["name"]}})
    what = point["settings"]["what"]
    if what == "crash":
        print("about to crash", flush=True); os.abort()
    if what == "hang":
        time.sleep(600)
    status = "failed" if what == "breaks" else "ok"
    line = {{"event": "end", "unit": unit["name"], "point": point["name"], "status": status}}
    append(lines, line | {{"variable": os.environ.get("TOY")}})
    if what == "breaks":
        os._exit(STICKY)
"""


def toy_unit(name: str, *what: str, group: str = "", limit: float = 0.2) -> Unit:
    """`limit` is of a point that hangs; others have time enough on any machine."""
    made = [
        Point(f"{name} {i}", "toy", limit if w == "hang" else 600.0, {"what": w})
        for i, w in enumerate(what)
    ]
    return Unit(name, tuple(made), {"TOY": name}, group)


def supervise(
    folder: Path, units: list[Unit], seconds: float = 600, workers: int = 2
) -> dict[str, dict[str, Any]]:
    script = folder / "toy.py"
    script.write_text(TOY_WORKER.format(root=str(ROOT)))
    supervisor = Supervisor(
        folder / "lines.jsonl", folder, workers, time.monotonic() + seconds, alone=False,
        what={"part": "toys"}, worker=(sys.executable, str(script)),
    )  # fmt: skip
    records = supervisor.run(units)
    assert parsed((folder / "lines.jsonl").read_text()) == records
    assert all(record["part"] == "toys" for record in records)
    names = [point.name for unit in units for point in unit.points]
    assert sorted(record["point"] for record in records) == sorted(names), "one record a point"
    return {record["point"]: record for record in records}


def test_a_dead_worker_costs_one_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import supervise as module

    monkeypatch.setattr(module, "GRACE", 0.8)
    found = supervise(
        tmp_path,
        [
            toy_unit("fine", "ok", "ok"),
            toy_unit("crashes", "ok", "crash", "ok"),
            toy_unit("hangs", "hang", "ok"),
            toy_unit("breaks", "breaks", "ok"),
            toy_unit("never begins", "ok", "ok"),
            toy_unit("too often", "crash", "breaks", "ok", "ok"),
        ],
    )
    statuses = {name: record["status"] for name, record in found.items()}
    assert statuses == {
        "fine 0": "ok", "fine 1": "ok",
        "crashes 0": "ok", "crashes 1": "crashed", "crashes 2": "ok",
        "hangs 0": "hung", "hangs 1": "ok",
        "breaks 0": "failed", "breaks 1": "ok",
        "never begins 0": "crashed", "never begins 1": "crashed",
        "too often 0": "crashed", "too often 1": "failed",
        "too often 2": "given up", "too often 3": "given up",
    }  # fmt: skip
    assert found["crashes 1"]["reason"] == "the process ended by SIGABRT"
    assert found["crashes 1"]["output"] == ["about to crash"]
    assert "exit status 3 before the first point" in found["never begins 0"]["reason"]
    assert found["never begins 0"]["output"] == ["no such module"]
    assert found["fine 0"]["variable"] == "fine", "a unit has an environment of its own"


def test_others_go_before_the_group_of_a_dead_worker(tmp_path: Path) -> None:
    units = [
        toy_unit("a large", "crash", group="a"),
        toy_unit("a small", "ok", group="a"),
        toy_unit("b large", "ok", group="b"),
    ]
    assert list(supervise(tmp_path, units, workers=1)) == ["a large 0", "b large 0", "a small 0"]


def test_what_there_is_no_time_for_is_said(tmp_path: Path) -> None:
    units = [toy_unit("hangs", "hang", "ok", limit=600), toy_unit("waits", "ok")]
    found = supervise(tmp_path, units, seconds=1.0, workers=1)
    assert {record["status"] for record in found.values()} == {"no time"}


def test_no_worker_outlives_the_supervisor(tmp_path: Path) -> None:
    """A stage that is over its time is terminated; its workers would go on using the GPU."""
    script = tmp_path / "toy.py"
    script.write_text(TOY_WORKER.format(root=str(ROOT)))
    code = (
        "import sys, math; from pathlib import Path; \n"
        "from benchmarks.gpu import supervise; from benchmarks.gpu.points import Point, Unit\n"
        "supervise.exit_on_sigterm()\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "unit = Unit('hangs', (Point('hangs 0', 'toy', 600, {'what': 'hang'}),))\n"
        "supervise.Supervisor(folder / 'lines', folder, 1, math.inf, False,\n"
        f"    worker=(sys.executable, {str(script)!r})).run([unit])\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    began = tmp_path / "workers.jsonl"
    while not (began.exists() and began.read_text()):
        assert supervisor.poll() is None
        time.sleep(0.05)
    supervisor.terminate()
    assert supervisor.wait() == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "workers.jsonl.pid").read_text()), 0)


@pytest.mark.long
def test_a_worker_on_a_mocked_gpu(tmp_path: Path) -> None:
    """Right, wrong, and an illegal access after which the process leaves by itself."""
    needs_ral_cuda()
    kernels = ["attention spans", "policy_divergence jsd", "loss kl", "attention no spans"]
    checks = {
        point.settings["call"]: point
        for unit in points.each_op(True)
        for point in unit.points
        if point.settings["backend"] == "cuda"
    }
    unit = Unit("cuda", tuple(checks[name] for name in kernels))
    (tmp_path / "unit.json").write_text(json.dumps(asdict(unit)))
    faults = [
        {"kernel": "cuda policy_divergence bwd", "kind": "wrong"},
        {"kernel": "cuda policy_divergence loss", "kind": "illegal access"},
    ]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu.worker", str(tmp_path / "unit.json"),
         str(tmp_path / "lines"), str(tmp_path / "lock")],
        cwd=ROOT, env={**os.environ, mock.VARIABLE: json.dumps({"faults": faults})},
    )  # fmt: skip
    assert done.returncode == STICKY
    lines = parsed((tmp_path / "lines").read_text())
    ends = [line for line in lines if line["event"] == "end"]
    assert [line["status"] for line in ends] == ["ok", "wrong", "failed"]
    assert ends[0]["errors"]["dv"] < 0.01
    assert ends[1]["reason"].startswith("dk error")
    assert "illegal memory access" in ends[2]["reason"]
    assert [line["event"] for line in lines[-2:]] == ["begin", "end"], "no point after it"


def test_a_peer_that_cannot_run_costs_the_ratio_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(problem: Any) -> Any:
        raise RuntimeError("No available kernel.")

    broken = replace(ATTENTION.registry["sdpa"], prepare=prepare)
    size = {"heads": [2, 1, 64], "seqlen": 300, "layout": "aligned", "mode": "forward"}
    for peer in (ATTENTION.registry["sdpa"], broken):
        monkeypatch.setitem(ATTENTION.registry, "sdpa", peer)
        record = work.time(torch.device("cpu"), "attention", "ral", "sdpa_cudnn", **size)
        assert record["status"] == "ok" and record["ms"]["median"] > 0
        assert ("ratio" in record) == ("peer_error" not in record) == (peer is not broken)
    assert record["peer_error"] == "RuntimeError: No available kernel."


def test_kernels_for_hopper_are_never_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without them a point fails; it would be measured with those for sm_80."""
    monkeypatch.setattr(cuda_library, "hopper", lambda: "built without")
    asked = pytest.raises(RuntimeError, match="no kernels for Hopper: built without")
    with asked, work.kernels_of("hopper"):
        pass
    monkeypatch.setattr(cuda_library, "hopper", lambda: None)
    with work.kernels_of("hopper"):
        assert cuda_library.NOT_TAKEN != -2, "what they refuse is an error"
    assert cuda_library.NOT_TAKEN == -2


def test_every_point_is_named_once() -> None:
    for plan in PLANS.values():
        names = [point.name for unit in plan(False) for point in unit.points]
        assert names and len(set(names)) == len(names)
        assert [p.name for unit in plan(True) for p in unit.points] == names
    largest = points.attention_times(False)[0].points[0]
    assert largest.settings["seqlen"] == 65536, "what may not fit is known first"
    environments = {unit.group: unit.environment for unit in points.attention_times(False)}
    assert environments["hopper"] == {"RAL_CUDA_HOPPER": "1"}
    calls = {name.rsplit(" ", 2)[0] for name in sanitizer.names()}
    checked = {p.name.rsplit(" ", 2)[0] for unit in points.each_op(False) for p in unit.points}
    assert checked == calls


def test_lines_of_a_killed_process(tmp_path: Path) -> None:
    append(tmp_path / "lines", {"point": 1})
    with (tmp_path / "lines").open("a") as file:
        file.write('{"point": 2, "sta')
    assert parsed((tmp_path / "lines").read_text()) == [{"point": 1}]


# -- compilers, profiles, sanitizer ----------------------------------------------------------------


def test_failures_are_repeated_under_other_compilers(tmp_path: Path) -> None:
    """Of Triton's kernels alone: nvcc compiled the others."""
    names = [point.name for unit in points.attention_times(False) for point in unit.points]
    triton, cuda = (next(n for n in names if n.startswith(short)) for short in ("triton", "cuda"))
    test = "tests/ops/test_policy.py::test_policy[triton-float32-gqa_7]"
    for record in (
        {"point": triton, "status": "wrong", "part": "attention_times"},
        {"point": cuda, "status": "crashed", "part": "attention_times"},
        {"point": test, "status": "failed", "part": "tests"},
        {"point": "tests/cuda_host/test_x.py::test", "status": "failed", "part": "tests"},
        {"point": triton, "status": "wrong", "part": "compilers"},
        {"point": "unknown", "status": "wrong", "part": "attention_times"},
        {"point": names[-1], "status": "no time", "part": "attention_times"},
    ):
        append(tmp_path / "lines", record)
    found = compilers.failures([tmp_path / "lines", tmp_path / "absent"], rehearse=False)
    assert [point.name for point in found] == [triton, test]
    assert found[1].kind == "test" and found[1].settings == {"test": test}
    units = compilers.units(found, {"release 13.0": Path("/bin/ptxas")}, tmp_path)
    assert [unit.name for unit in units[:2]] == [
        f"{triton} @ as before",
        f"{triton} @ release 13.0",
    ]
    assert units[0].environment == {}
    assert units[1].environment["TRITON_PTXAS_PATH"] == "/bin/ptxas"
    assert "TRITON_CACHE_DIR" in units[1].environment


def test_verdicts() -> None:
    def verdict(*statuses: str) -> str:
        labels = (compilers.BUNDLED, "release 13.0", "release 13.1")
        records = [
            {"point": f"p @ {label}", "status": status}
            for label, status in zip(labels, statuses, strict=True)
        ]
        return str(compilers.verdicts(records)["p"]["verdict"])

    assert verdict("wrong", "wrong", "ok") == "the compiler: right with release 13.1"
    assert verdict("wrong", "wrong", "wrong") == "ours, or every compiler's"
    assert verdict("ok", "ok", "ok") == "not seen again"
    assert verdict("hung", "wrong", "no time") == "open: no time"


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","1","attention_fwd_kernel","gpu__time_duration.sum","ns","3,100,000"
"0","1","attention_fwd_kernel","launch__registers_per_thread","register/thread","242"
"1","1","attention_bwd_dkdv_kernel","gpu__time_duration.sum","ns","9,000,000"
"""


def test_profiles() -> None:
    first, second = profile.parsed(NCU)
    assert first == {
        "kernel": "attention_fwd_kernel", "time": "3,100,000 ns", "registers": "242 register/thread"
    }  # fmt: skip
    assert second["kernel"] == "attention_bwd_dkdv_kernel"
    assert profile.parsed("==ERROR== no permission") == []


def test_a_tool_that_finds_something_fails_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`false` stands for a tool that finds something, and ends before the first call."""
    given = (2, sanitizer.names()[:5], tmp_path / "small.json")
    assert sanitizer.run_watched(["false"], *given) == 1
    found = json.loads((tmp_path / "small.json").read_text())
    assert {failure["call"] for failure in found["failed"]} == set(sanitizer.names()[:5])
    assert not found["ran"] and "0 of 5 calls ran, 5 failed" in capsys.readouterr().out
    until = time.monotonic() + 0.5
    assert sanitizer.run_watched(["sh", "-c", "sleep 600"], *given, until=until) == 0
    found = json.loads((tmp_path / "small.json").read_text())
    assert not found["failed"], "what others found is written in time"
