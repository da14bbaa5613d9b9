"""What each file of ral_cuda costs nvcc: CPU seconds, so that the load of a machine counts less.

    python setup.py build_ext --inplace          # or `cmake -S . -B FOLDER`: it compiles nothing
    python -m benchmarks.codegen.build_steps     # the slowest first; --json FILE keeps the numbers

Each file is compiled with CMake's own command, one after the other. The build is left as it is.
"""

from __future__ import annotations

import argparse
import json
import resource
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from .cuda import nvcc_version

BUILD_DIR = Path(__file__).resolve().parents[2] / "build" / "cmake"


def commands(build_dir: Path) -> dict[str, list[str]]:
    """How CMake compiles each `.cu` file from `build_dir`, by folder and name."""
    entries = json.loads((build_dir / "compile_commands.json").read_text())
    files = {Path(entry["file"]): shlex.split(entry["command"]) for entry in entries}
    return {
        f"{file.parent.name}/{file.name}": command
        for file, command in files.items()
        if file.suffix == ".cu"
    }


def cpu_seconds(command: Sequence[str], build_dir: Path, output: Path) -> float:
    """What a compilation and its children take, in user and system mode.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    at = command.index("-o") + 1
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*command[:at], str(output), *command[at + 1 :]], cwd=build_dir, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--build-dir", type=Path, default=BUILD_DIR, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="a file for the numbers")
    options = parser.parse_args(arguments)
    try:
        found = commands(options.build_dir)
    except OSError as error:
        parser.error(f"{error}; CMake writes it when it configures {options.build_dir}")
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, command in found.items():
            seconds[name] = cpu_seconds(command, options.build_dir, Path(folder, "object"))
    seconds = dict(sorted(seconds.items(), key=lambda item: -item[1]))
    for name, value in seconds.items():
        print(f"{value:7.1f}  {name}")
    print(f"{sum(seconds.values()):7.1f}  all, by {nvcc_version()}")
    if options.json is not None:
        facts = {"nvcc": nvcc_version(), "cpu_seconds": seconds}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
