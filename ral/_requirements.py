"""What the trainer needs of TRL, checked before anything of it is used."""

from __future__ import annotations

import importlib.metadata

# RALTrainer overrides private methods of GRPOTrainer; a newer TRL may have renamed them.
OLDEST, FIRST_UNKNOWN = (1, 16), (1, 17)


def check_trl() -> None:
    """Check that TRL is there, in a version whose private methods are those that we override.

    Raises:
        ImportError: it is missing, or another version.
    """
    try:
        version = importlib.metadata.version("trl")
    except importlib.metadata.PackageNotFoundError as error:
        versions = f"trl>={_text(OLDEST)},<{_text(FIRST_UNKNOWN)}"
        raise ImportError(
            f"ral: the trainer needs TRL: `pip install '{versions}'`, "
            "or all that it uses: `pip install '.[train]'` in a checkout of ral_kernels"
        ) from error
    parts = version.split(".")
    if not OLDEST <= (int(parts[0]), int(parts[1])) < FIRST_UNKNOWN:
        raise ImportError(
            f"ral: the trainer needs trl>={_text(OLDEST)},<{_text(FIRST_UNKNOWN)}, whose private "
            f"methods it overrides; got trl {version}"
        )


def _text(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
