"""What the trainer needs of TRL, checked before anything of it is used."""

from __future__ import annotations

import importlib.metadata

# RALTrainer overrides private methods of GRPOTrainer, which any release may rename. All tests of
# the trainer passed with 1.16; with 1.15 the quick tier: `make test-trl TRL=1.15.0 TIER=quick`.
TESTED = ((1, 15), (1, 16))
VERSIONS = f"trl>={TESTED[0][0]}.{TESTED[0][1]},<{TESTED[-1][0]}.{TESTED[-1][1] + 1}"


def check_trl() -> None:
    """Check that TRL is there, in a version that the trainer was tested with.

    Raises:
        ImportError: it is missing, or another version.
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"ral: the trainer needs TRL: `pip install '{VERSIONS}'`, "
            "or all that it uses: `pip install '.[train]'` in a checkout of ral_kernels"
        ) from error
    major, minor = version.split(".")[:2]
    if (int(major), int(minor)) not in TESTED:
        raise ImportError(
            f"ral: the trainer needs {VERSIONS}, the versions that it was tested with, because it "
            f"overrides private methods; got trl {version}"
        )
