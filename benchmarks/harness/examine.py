"""One run of one contestant: whether it is right, its memory, and roughly its time.

Each examination has its own process (`FreshProcesses`). So peak memory is the contestant's alone.
A contestant that exhausts memory, hangs or loses the CUDA context ends no other.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..problems import OBJECTIVES
from .gate import relative_errors, verdict
from .machine import peak_memory, reset_peak_memory
from .objective import Call, Contestant, Objective, Problem


def leaves(problem: Problem, backward: bool) -> tuple[Tensor, ...]:
    """The inputs as leaves of a graph of their own, in the memory layout of the problem."""
    return tuple(tensor.detach().requires_grad_(backward) for tensor in problem.inputs())


def run_once(
    objective: Objective,
    call: Call,
    inputs: tuple[Tensor, ...],
    output_gradients: tuple[Tensor, ...],
    backward: bool,
) -> dict[str, Tensor | None]:
    """What is timed: forward, and the backward of the outputs' products with their gradients."""
    with torch.set_grad_enabled(backward):
        outputs = call(*inputs)
        results = dict(zip(objective.outputs, outputs, strict=True))
        if backward:
            pairs = [
                (output, gradient.to(output.dtype))
                for output, gradient in zip(outputs, output_gradients, strict=True)
                if output is not None
            ]
            found = torch.autograd.grad([o for o, _ in pairs], inputs, [g for _, g in pairs])
            results.update(zip(objective.gradients, found, strict=True))
    return results


def errors_of(
    objective: Objective,
    problem: Problem,
    results: dict[str, Tensor | None],
    wanted: Mapping[str, Tensor],
) -> dict[str, float]:
    """Relative errors of a run with the gated output gradients."""
    got = {
        name: problem.judged(name, x) if x is not None and name in objective.outputs else x
        for name, x in results.items()
    }
    return relative_errors(got, wanted)


def examine(
    objective: Objective,
    contestant: Contestant,
    problem: Problem,
    backward: bool,
    exact: Callable[[str], Mapping[str, Tensor]],
) -> dict[str, Any]:
    """Run a contestant once: `status`, `reason`, `errors`, `seconds`, `peak_bytes` over the inputs.

    The run uses the gated output gradients; for attention those are on the gate's rows only. The
    work is the same, and every gradient of the result is known. `exact` returns the answer of a
    name, on the problem's device.
    """
    device, problem = problem.q.device, contestant.view(problem)
    call = contestant.prepare(problem)
    inputs = leaves(problem, backward)
    gradients = problem.output_gradients(gated=True)
    if contestant.compiles or device.type == "cuda":  # there all compile
        run_once(objective, call, inputs, gradients, backward)
    before = reset_peak_memory(device)
    start = time.perf_counter()
    results = run_once(objective, call, inputs, gradients, backward)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    peak = peak_memory(device) - before

    wanted = exact(contestant.answer)  # now: its memory is not the contestant's
    errors = errors_of(objective, problem, results, wanted)
    has_slack = objective.slack_for_ours or not contestant.ours
    reason = verdict(errors, problem.q.dtype, wanted if has_slack else None)
    status = "ok" if reason is None else "wrong"
    return {
        "status": status,
        "reason": reason,
        "errors": errors,
        "seconds": seconds,
        "peak_bytes": max(peak, 0),
    }


def _exact(
    objective: Objective, problem: Problem, file: str | None, answer: str
) -> Mapping[str, Tensor]:
    """From a file, or computed again, which is faster than reading on a GPU."""
    if file is None:
        return objective.exact(problem, {answer})[answer]
    return dict(torch.load(file, weights_only=True)[answer])


def failure(error: BaseException) -> dict[str, Any]:
    """The record of a contestant that raised: the exception's name and its first line."""
    first_line = (str(error).strip().splitlines() or [""])[0]
    return {"status": "failed", "reason": f"{type(error).__name__}: {first_line[:160]}"}


def examine_here(
    objective: Objective,
    contestant: Contestant,
    problem: Problem,
    backward: bool,
    exact: Callable[[str], Mapping[str, Tensor]],
) -> dict[str, Any]:
    """`examine` in this process, with an exception turned into a record."""
    try:
        return examine(objective, contestant, problem, backward, exact)
    except Exception as error:
        return failure(error)
    finally:
        gc.collect()
        if problem.q.is_cuda:
            torch.cuda.empty_cache()


class FreshProcesses:
    """A server that has imported everything and computed nothing. It forks for each examination.

    A fork starts in milliseconds, where a new interpreter imports torch for seconds. It is as clean
    as a new process: no pool of threads, no allocator history.
    """

    def __init__(self, threads: int) -> None:
        # The server must import what this process imported, wherever it found it.
        code = (
            "import json, sys; sys.path[:] = json.loads(sys.argv.pop(1)); "
            f"from {__name__} import main; main()"
        )
        environment = dict(
            os.environ,
            # Every larger block is mapped on its own and goes back to the system when it is freed;
            # otherwise glibc moves this threshold while it runs, and memory of past blocks hides
            # the need for new ones.
            MALLOC_MMAP_THRESHOLD_=str(1 << 18),
            MALLOC_TRIM_THRESHOLD_=str(1 << 18),
            TORCHINDUCTOR_COMPILE_THREADS="1",
            # The server must not touch CUDA, or no fork of it could: torch asks NVML instead.
            PYTORCH_NVML_BASED_CUDA_CHECK="1",
        )
        self._server = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(sys.path), str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )

    def examine(
        self,
        objective: str,
        contestant: str,
        problem_file: str,
        backward: bool,
        exact_file: str | None,
        timeout: float,
    ) -> dict[str, Any]:
        """`examine` in a fresh process; a killed or overdue one comes back as a record too.

        Without `exact_file` the process computes the exact answer itself.
        """
        request = {
            "objective": objective,
            "contestant": contestant,
            "problem_file": problem_file,
            "backward": backward,
            "exact_file": exact_file,
            "timeout": timeout,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise RuntimeError(f"sweeps: the examining process ended with {self._server.wait()}")
        record: dict[str, Any] = json.loads(answer)
        return record

    def close(self) -> None:
        if self._server.stdin is not None:
            self._server.stdin.close()
        self._server.wait()


def _examine_in_fork(request: dict[str, Any], threads: int) -> dict[str, Any]:
    """Fork, examine in the child, and read its record from a pipe."""
    objective = OBJECTIVES[request["objective"]]
    contestant = objective.registry[request["contestant"]]
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            torch.set_num_threads(threads)
            problem = objective.problem(**torch.load(request["problem_file"], weights_only=True))
            if not (contestant.compiles or problem.q.is_cuda):  # those warm up at full size
                _warm_up(objective, contestant, problem, request["backward"])
            exact = functools.partial(_exact, objective, problem, request["exact_file"])
            record = examine(objective, contestant, problem, request["backward"], exact)
        except Exception as error:
            if contestant.ours:
                traceback.print_exc(file=sys.stderr)
            record = failure(error)
        with os.fdopen(writer, "w") as pipe:
            json.dump(record, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        ready, _, _ = select.select([pipe], [], [], request["timeout"])
        if not ready:
            os.kill(child, signal.SIGKILL)
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if not ready:
        return {"status": "skipped", "reason": f"a run takes over {request['timeout']:.0f} s"}
    if not answer:
        name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "an exit"
        why = "out of memory?" if name == "SIGKILL" else "crashed"
        return {"status": "failed", "reason": f"ended by {name} ({why})"}
    record = json.loads(answer)
    return record if isinstance(record, dict) else {"status": "failed", "reason": str(record)}


def _warm_up(
    objective: Objective, contestant: Contestant, problem: Problem, backward: bool
) -> None:
    """Start threads and do late imports, which are not the contestant's memory."""
    tiny = problem.tiny()
    gradients = tiny.output_gradients(gated=False)
    run_once(objective, contestant.prepare(tiny), leaves(tiny, backward), gradients, backward)
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Serve requests, one JSON line each, until stdin ends."""
    import torch._dynamo
    import torch._inductor.compile_fx  # noqa: F401  imported here once, not in every fork

    threads = int(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a contestant prints must not mix with the answers
    for line in sys.stdin:
        json.dump(_examine_in_fork(json.loads(line), threads), answers)
        answers.write("\n")
        answers.flush()
