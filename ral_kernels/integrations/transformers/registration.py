"""Registers "ral" as an attention implementation of transformers, and checks its version."""

from __future__ import annotations

NAME = "ral"  # a name that contains "flash" or "sdpa" would change what models do besides
OLDEST = (4, 57)


def check_transformers(user: str) -> None:
    """Refuse to go on where transformers is missing or older than supported.

    Args:
        user: what needs it, as the message calls it.

    Raises:
        ImportError: with the version found and the oldest that is supported.
    """
    wanted = ".".join(map(str, OLDEST))
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"{user}: transformers >= {wanted} must be installed (pip install "
            f"'transformers>={wanted}'); it is not"
        ) from error
    version = transformers.__version__
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < OLDEST:
        raise ImportError(f"{user}: transformers >= {wanted} must be installed; got {version}")


def register() -> None:
    """Make `attn_implementation="ral"` known to transformers: the attention and the mask function.

    `import ral_kernels` does this by itself, before or after transformers is imported. Calling it
    again changes nothing.

    Raises:
        ImportError: transformers is missing or older than supported.
    """
    check_transformers("register")
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    from .attention import attention_forward
    from .masks import key_mask

    AttentionInterface.register(NAME, attention_forward)
    # Without a mask function of the same name transformers gives models no mask at all.
    AttentionMaskInterface.register(NAME, key_mask)
