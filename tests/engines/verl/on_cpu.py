"""verl on a machine without an accelerator, for tests: a platform plugin, and flash attention.

With `rollouts.ENVIRONMENT` verl imports this module as it imports any plugin. Its own platforms are
CUDA, NPU and their kin.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from verl.plugin.platform.platform_base import PlatformBase
from verl.plugin.platform.platform_manager import PlatformRegistry

import ral_kernels as rk
from tests.engines.verl.rollouts import FLASH

_DEVICE = SimpleNamespace(
    **{name: getattr(torch.cpu, name) for name in ("synchronize", "is_available", "Stream")},
    current_device=lambda: "cpu",
    get_device_name=lambda *_: "cpu",
    empty_cache=lambda: None,
    max_memory_allocated=lambda: 0,
    max_memory_reserved=lambda: 0,
    memory_allocated=lambda: 0,
    memory_reserved=lambda: 0,
    mem_get_info=lambda: (0, 0),
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
)
_VALUES: dict[str, Any] = {
    "is_available": True,
    "is_platform_available": True,
    "current_device": "cpu",
    "device_count": 1,
    "get_device_capability": (None, None),
    "communication_backend_name": "gloo",
    "visible_devices_envvar": "CPU_VISIBLE_DEVICES",
    "nvtx_range": contextlib.nullcontext(),
    "ray_resource_name": "CPU",
    "ray_noset_envvars": [],
    "is_ipc_supported": False,
    "cudart": None,
}
_DONE = ("set_device", "synchronize", "set_allocator_settings", "empty_cache")
_SEEDING = ("manual_seed", "manual_seed_all")
_METHODS: dict[str, Any] = {
    name: (lambda self, *_, _value=value, **__: _value) for name, value in _VALUES.items()
}
_METHODS |= dict.fromkeys((*_DONE, "profiler_start", "profiler_stop"), lambda self, *_: None)
_METHODS |= dict.fromkeys(_SEEDING, lambda self, seed: torch.manual_seed(seed))
_METHODS |= {"device_name": "cpu", "vendor_name": "cpu", "device_module": _DEVICE}
PlatformRegistry.register(platform="cpu")(type("CPU", (PlatformBase,), _METHODS))


def flash_attention() -> None:
    """Give verl the flash attention that it calls by name, in float32, by `ral_kernels`.

    Text models reach it as the implementation `FLASH`, through verl's exchange of heads for rows
    under Ulysses; Qwen2.5-VL through verl's own forward of its attention.
    """
    import verl.models.transformers.monkey_patch as patches
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.flash_attention import flash_attention_forward
    from transformers.masking_utils import flash_attention_mask
    from verl.models.transformers import qwen2_vl

    def varlen(*, max_seqlen_q: Any, max_seqlen_k: Any, dropout_p: float, **given: Any) -> Any:
        sizes = {"max_seqlen_q": int(max_seqlen_q), "max_seqlen_k": int(max_seqlen_k)}
        return rk.flash_attn_varlen_func(**given, **sizes)

    def packed(q: Any, k: Any, v: Any, mask: Any, *_: Any, position_ids: Any, **__: Any) -> Any:
        assert mask is None and q.shape[0] == 1
        (starts,) = torch.nonzero(position_ids[0] == 0, as_tuple=True)
        offsets = torch.cat([starts, torch.tensor([q.shape[1]])]).int()
        longest = int(offsets.diff().max())
        q, k, v = q[0], k[0], v[0]
        return rk.flash_attn_varlen_func(q, k, v, offsets, offsets, longest, longest, causal=True)[
            None
        ]

    source: Any = patches
    source._flash_attention_forward = packed
    AttentionInterface.register(FLASH, flash_attention_forward)
    AttentionMaskInterface.register(FLASH, flash_attention_mask)
    vision: Any = qwen2_vl
    vision.flash_attn_varlen_func = varlen
    vision._flash_supports_window_size = vision._flash_supports_deterministic = False
    vision._flash_use_top_left_mask = False
    vision.fa_peft_integration_check = lambda q, k, v, target_dtype=None: (q, k, v)
