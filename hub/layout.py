"""Lays the package out as the Hub's `kernels` loads it: `make hub`.

    python -m hub.layout [OUT]        # default build/hub
    kernels.get_local_kernel(Path("build/hub"))

A folder for each backend of `build.toml` holds the package, the native libraries that are built and
`metadata.json`. Its `id` is the name that the package is imported under, and hence the namespace of
its ops: it changes with the files.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import tomllib

ROOT = Path(__file__).resolve().parents[1]


def lay_out(out: Path) -> list[Path]:
    """Write the layout into `out`, in place of an older one; returns the backends' folders."""
    general = tomllib.loads((ROOT / "hub" / "build.toml").read_text())["general"]
    shutil.rmtree(out, ignore_errors=True)
    return [_variant(out / "build" / f"torch-{x}", x, general) for x in general["backends"]]


def _variant(folder: Path, backend: str, general: dict[str, Any]) -> Path:
    shutil.copytree(ROOT / "ral_kernels", folder, ignore=shutil.ignore_patterns("__pycache__"))
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).digest()
        for path in paths
    }
    content = hashlib.sha256(b"".join(digests.values())).hexdigest()[:7]
    metadata = {
        "id": f"_{general['name'].replace('-', '_')}_{backend}_{content}",
        "name": general["name"],
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {
            "algorithm": "sha256",
            "files": {name: base64.b64encode(x).decode() for name, x in digests.items()},
        },
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=1) + "\n")
    return folder


if __name__ == "__main__":
    for path in lay_out(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"):
        print(path)
