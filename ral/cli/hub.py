"""Whether a name that is no path is on the Hub: one question, in place of minutes of retries."""

from __future__ import annotations

from pathlib import Path

from ..data.sources import may_be_on_hub
from .errors import Refused

_SECONDS = 10.0
# A file that nearly every repository of a kind has. It may be missing: the answer then says so.
_FILES = {"model": "config.json", "dataset": "README.md"}


def check_model_name(name: str) -> None:
    """Check that a model's name is a folder, or on the Hub.

    Raises:
        Refused: it is none.
    """
    if Path(name).expanduser().is_dir():
        return
    if not may_be_on_hub(name):
        raise Refused(f"there is no model folder {name}, and that is not a name on the Hub")
    check_on_hub(name, "model")


def check_on_hub(name: str, kind: str) -> None:
    """Check that OWNER/NAME is in the cache of the Hub, or on it; what comes later retries.

    Args:
        name: that no path has.
        kind: "model" or "dataset".

    Raises:
        Refused: it is neither, or the Hub does not answer.
    """
    import huggingface_hub as hub
    from huggingface_hub import errors

    if any(
        (Path(hub.constants.HF_HUB_CACHE) / f"{kind}s--{name.replace('/', '--')}").glob(
            "snapshots/*"
        )
    ):
        return
    nothing = f"there is no {kind} folder {name}"
    url = hub.hf_hub_url(name, _FILES[kind], repo_type=kind)
    try:
        hub.get_hf_file_metadata(url, timeout=_SECONDS)
    except errors.RepositoryNotFoundError as error:
        if not isinstance(error, errors.GatedRepoError):  # `from_pretrained` says how to get in
            raise Refused(f"{nothing}, and no {kind} of that name on the Hub") from error
    except errors.OfflineModeIsEnabled as error:
        raise Refused(
            f"{nothing}, it is not in the Hub's cache, and HF_HUB_OFFLINE is set"
        ) from error
    except errors.EntryNotFoundError:
        return
    except Exception as error:  # of the network
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise Refused(f"{nothing}, and the Hub cannot be reached: {reason[0]}") from error
