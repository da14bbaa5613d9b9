"""RAL in verl: an engine whose loss has the attention term of eq. (3), and its configuration.

verl imports this module in each worker (`actor_rollout_ref.model.external_lib`), and makes its
actor's configuration a `RALActorConfig` (`actor_rollout_ref.actor._target_`). `verl.yaml` beside
this file sets both. docs/verl.md says how to use it.

The old policy's q and k are taken in the forward that recomputes old log-probabilities. In the
update each row is compared with its own, whatever micro-batch, mini-batch or epoch it is in.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import importlib.metadata
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import ral_kernels as rk

OLDEST, FIRST_UNKNOWN = (0, 9), (0, 10)  # the engine's methods are no public interface of verl


def _check_verl() -> None:
    """Check that verl is there, in a version that is known, and that TRL does not break it."""
    wanted = "'verl>={}.{},<{}.{}'".format(*OLDEST, *FIRST_UNKNOWN)
    try:
        version = importlib.metadata.version("verl")
    except importlib.metadata.PackageNotFoundError as error:
        raise ImportError(
            f"ral.engines.verl: verl is missing: `pip install {wanted}`, in an environment without "
            "TRL (docs/verl.md)"
        ) from error
    if not OLDEST <= tuple(map(int, version.split(".")[:2])) < FIRST_UNKNOWN:
        raise ImportError(f"ral.engines.verl: verl must be {wanted}; got {version}")
    if importlib.util.find_spec("trl") is None:
        return
    # Where TRL is installed, verl patches a class of it, without which no model can be built.
    for name in ("trl.experimental.ppo", "trl"):
        try:
            if hasattr(importlib.import_module(name), "AutoModelForCausalLMWithValueHead"):
                return
        except ImportError:
            continue
    raise ImportError(
        "ral.engines.verl: TRL must not be in verl's environment, or be one that still has "
        "AutoModelForCausalLMWithValueHead, which verl patches; got trl "
        f"{importlib.metadata.version('trl')}, as the trainer of `ral` needs it. Keep two "
        "environments (docs/verl.md)"
    )


_check_verl()

from verl.base_config import BaseConfig  # noqa: E402  (after the check, whose message is clearer)
from verl.models.transformers import qwen2_vl  # noqa: E402
from verl.utils import tensordict_utils as tu  # noqa: E402
from verl.utils.config import omega_conf_to_dataclass  # noqa: E402
from verl.utils.metric import AggregationType, Metric  # noqa: E402
from verl.workers.config import FSDPActorConfig  # noqa: E402
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead  # noqa: E402

DIVERGENCES = ("jsd", "kl", "reverse_kl")
REDUCTIONS = ("token_mean", "sequence_mean")
NAME = "ral_fsdp2"  # of the engine in verl's registry


@dataclass
class RALTermConfig(BaseConfig):
    """`actor_rollout_ref.actor.ral`: the attention term λ · E_t[A_t D(p_θ^t ‖ p_old^t)], eq. (3).

    The settings are those of `RALConfig`, without `attn_`.

    Attributes:
        coef: λ; 0 leaves verl's own engine.
        layers: text decoder layers: a number, negative from the end, a list, or "all".
        divergence: "jsd", "kl" (policy from old policy) or "reverse_kl".
        reduction: "token_mean", over all response tokens of a mini-batch, on every process;
            "sequence_mean", the mean of each response first, over `global_batch_size` responses.
        exclude_self: whether a query's own key is left out and the rest renormalised, eq. (1).
        backend: of the attention ops; None = the first that can run.
        snapshot_device: device that keeps the old policy's q and k; None = where they were made.

    Raises:
        ValueError: a setting has an invalid value.
    """

    coef: float = 1.0
    layers: Any = -1
    divergence: str = "jsd"
    reduction: str = "token_mean"
    exclude_self: bool = True
    backend: str | None = None
    snapshot_device: str | None = None

    def __post_init__(self) -> None:
        for name, known in (
            ("divergence", DIVERGENCES),
            ("reduction", REDUCTIONS),
            ("backend", (None, *rk.available_backends())),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"actor.ral: {name} must be one of {', '.join(map(str, known))}; got "
                    f"{getattr(self, name)!r}"
                )
        if not 0 <= self.coef < float("inf"):
            raise ValueError(f"actor.ral: coef must be finite and >= 0; got {self.coef!r}")


@dataclass
class RALActorConfig(FSDPActorConfig):
    """verl's `FSDPActorConfig` with the settings of the RAL term in `ral`.

    Raises:
        ValueError: a setting of `ral` has an invalid value; or, from `validate`, a schedule under
            which the term is always zero.
        NotImplementedError: a setting of verl's under which the term does not work.
        omegaconf.errors.ConfigKeyError: `ral` has a setting that does not exist.
    """

    _mutable_fields = FSDPActorConfig._mutable_fields | {"ral"}

    ral: Any = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.ral, RALTermConfig):
            self.ral = omega_conf_to_dataclass(self.ral, RALTermConfig)
        if self.ral.coef == 0:
            return
        if self.strategy != "fsdp2":
            raise NotImplementedError(f"actor.ral: strategy must be 'fsdp2'; got {self.strategy!r}")
        if self.use_prefix_grouper:
            raise NotImplementedError(
                "actor.ral: use_prefix_grouper is not supported: rows would share their prompt"
            )
        # As verl itself hands the strategy on: an engine gets nothing else of the actor's settings.
        object.__setattr__(self.engine, "ral", self.ral)
        object.__setattr__(self.engine, "strategy", NAME)

    def validate(
        self, n_gpus: int, train_batch_size: int, model_config: dict[str, Any] | None = None
    ) -> None:
        super().validate(n_gpus, train_batch_size, model_config)
        steps = self.ppo_epochs * (train_batch_size // self.ppo_mini_batch_size)
        if self.ral.coef > 0 and steps == 1:
            raise ValueError(
                "actor.ral: a batch must have two or more optimizer steps, because the term is "
                "exactly zero in the first: set ppo_epochs >= 2, or ppo_mini_batch_size below "
                f"data.train_batch_size; got ppo_epochs={self.ppo_epochs}, "
                f"ppo_mini_batch_size={self.ppo_mini_batch_size}, "
                f"train_batch_size={train_batch_size}"
            )


@dataclass(frozen=True)
class _Row:
    """One rollout of a micro-batch.

    key: what it is known by in the forward of old log-probabilities and in the update.
    batch: its place in the first dimension of q and k.
    start: position of its first key in the second: 0 if padded, its offset if packed.
    first, last: positions of the queries that predict its response, [first, last).
    """

    key: bytes
    batch: int
    start: int
    first: int
    last: int


def _rows_of(data: Any, packed: bool) -> list[_Row]:
    """The rows of a micro-batch, in its order."""
    ids = data["input_ids"]
    offsets = ids.offsets().tolist()
    responses = data["responses"]
    if responses.is_nested:
        lengths = responses.offsets().diff().tolist()
    else:
        lengths = data["attention_mask"][:, -responses.shape[1] :].sum(-1).tolist()
    keys = _keys_of(data)
    rows = []
    for i, (start, stop) in enumerate(itertools.pairwise(offsets)):
        if not packed:
            start, stop = 0, stop - start
        batch = 0 if packed else i
        rows.append(_Row(keys[i], batch, start, stop - 1 - lengths[i], stop - 1))
    return rows


def _keys_of(data: Any) -> list[bytes]:
    """A digest of each row: of its tokens, and of its prompt's `uid` or else of its pictures.

    Rows of one key have the same q and k, so that they may share a snapshot.
    """
    rows = data["input_ids"].unbind()
    uids, pictures = (_each(data, name, len(rows)) for name in ("uid", "multi_modal_inputs"))
    keys = []
    for ids, uid, of_row in zip(rows, uids, pictures, strict=True):
        digest = hashlib.blake2b(_bytes(ids), digest_size=16)
        if uid is not None:
            digest.update(str(uid).encode())
        else:
            for name, x in sorted((of_row or {}).items()):
                digest.update(name.encode())
                digest.update(_bytes(x) if isinstance(x, Tensor) else repr(x).encode())
        keys.append(digest.digest())
    return keys


def _each(data: Any, name: str, count: int) -> list[Any]:
    """A non-tensor entry of each row; tensordict stores one where all rows have the same."""
    found = tu.get(data, name)
    return list(found) if isinstance(found, (list, tuple)) else [found] * count


def _bytes(x: Tensor) -> Any:
    return x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def _padded(x: Tensor) -> Tensor:
    return torch.nested.to_padded_tensor(x, 0.0) if x.is_nested else x


@EngineRegistry.register("language_model", backend=NAME, device=["cuda", "npu", "cpu"])
class RALEngine(FSDPEngineWithLMHead):
    """verl's FSDP2 engine of a language model, whose loss has the RAL term of `engine_config.ral`.

    It works with packed rows (`use_remove_padding`), Ulysses sequence parallelism, gradient
    checkpointing, LoRA, dynamic micro-batches and several mini-batches and epochs on one batch.

    Under Ulysses each process has all heads of its part of the packed rows. It gathers k, compares
    its own queries, and keeps snapshots of whole rows, because the next packing cuts elsewhere.
    """

    def __init__(self, model_config: Any, engine_config: Any, *rest: Any, **named: Any) -> None:
        self._ral: RALTermConfig = engine_config.ral
        self._snapshots: dict[bytes, dict[int, rk.AttentionSnapshot]] = {}
        self._has_no_adapter = False
        engine_config = copy.copy(engine_config)
        object.__setattr__(engine_config, "strategy", "fsdp2")
        super().__init__(model_config, engine_config, *rest, **named)

    def _build_module(self) -> Any:
        _record_qwen2_vl()
        return super()._build_module()

    # -- the life of a batch's snapshots ---------------------------------------------------------

    def infer_batch(self, data: Any, loss_function: Callable[..., Any] | None = None) -> Any:
        if not self._has_no_adapter:
            self._snapshots.clear()
        return super().infer_batch(data, loss_function)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As verl's; what runs inside is the reference model, not the old policy."""
        with super().disable_adapter():
            self._has_no_adapter = True
            try:
                yield
            finally:
                self._has_no_adapter = False

    def get_per_tensor_param(self, *args: Any, **named: Any) -> Any:
        # The weights go to the rollouts: the batch is done, and they need the memory.
        self._snapshots.clear()
        return super().get_per_tensor_param(*args, **named)

    # -- one micro-batch -------------------------------------------------------------------------

    def forward_step(
        self, micro_batch: Any, loss_function: Callable[..., Any] | None, forward_only: bool
    ) -> Any:
        if forward_only and self._has_no_adapter:
            return super().forward_step(micro_batch, loss_function, forward_only)
        packed = tu.get_non_tensor_data(micro_batch, "use_remove_padding", default=True)
        rows = _rows_of(micro_batch, packed)
        with rk.capture(self.module, self._ral.layers, detach=forward_only) as captured:
            if forward_only:
                result = super().forward_step(micro_batch, loss_function, forward_only)
                self._keep(captured, rows)
                return result

            def with_term(**given: Any) -> Any:
                assert loss_function is not None
                result = loss_function(**given)
                if "model_output" not in given:  # it processes logits for a distillation
                    return result
                loss, metrics = result
                term, measured = self._term(captured, rows, given["data"])
                return loss + self._ral.coef * term, {**metrics, **measured}

            return super().forward_step(micro_batch, with_term, forward_only)

    def _keep(self, captured: Any, rows: list[_Row]) -> None:
        for layer in captured.layers:
            q, k = self._gathered(captured.q(layer)), self._gathered(captured.k(layer))
            for row in rows:
                self._snapshots.setdefault(row.key, {})[layer] = rk.AttentionSnapshot(
                    q[row.batch : row.batch + 1, :, row.first : row.last],
                    k[row.batch : row.batch + 1, :, row.start : row.last],
                    device=self._ral.snapshot_device,
                    **captured.layer(layer).scoring,
                )

    def _term(self, captured: Any, rows: list[_Row], data: Any) -> tuple[Tensor, dict[str, Any]]:
        """A process' part of E_t[A_t D_t], for verl's mean over processes, and its metrics."""
        mask = _padded(data["response_mask"]).bool()
        counted = mask.float()
        if self._ral.reduction == "sequence_mean":
            tokens = counted.sum(-1, keepdim=True)
            counted = counted / tokens.clamp(min=1) / data["global_batch_size"]
        else:
            counted = counted / data["batch_num_tokens"]
        weights = counted * _padded(data["advantages"]).float()
        # The mean over processes of a sum that is spread over data and sequence parallelism.
        sp_size = self.ulysses_sequence_parallel_size
        scale = data["dp_size"] * sp_size / len(captured.layers)
        loss = torch.zeros((), device=mask.device)
        divergence = torch.zeros((), device=mask.device)
        for layer in captured.layers:
            q, k = captured.q(layer), self._gathered(captured.k(layer))
            loss = (
                loss + k[:, :, :0].sum()
            )  # every process takes part in the backward of its gather
            for row, row_weights, row_mask in zip(rows, weights, mask, strict=True):
                part = self._part(row, layer, q, k)
                if part is None:
                    continue
                own, call = part
                options = {
                    "kind": self._ral.divergence,
                    "exclude_self": self._ral.exclude_self,
                    "backend": self._ral.backend,
                    **captured.layer(layer).scoring,
                }
                w = row_weights[None, own]
                loss = loss + rk.ral_loss(*call, w, w != 0, reduction="sum", **options)
                with torch.no_grad():
                    values = rk.attention_divergence(*call, **options)
                    divergence += values[row_mask[None, own] & values.isfinite()].sum()
        divergence = divergence / data["batch_num_tokens"]
        loss, divergence = loss * scale, divergence * scale
        value = torch.stack([loss.detach(), divergence])
        if sp_size > 1:  # the same value everywhere, as verl's own losses
            torch.distributed.all_reduce(value, group=self.ulysses_parallel_group)
            value = value / sp_size
            loss = loss + (value[0] - loss.detach())
        names = ("attn/loss", "attn/divergence")
        return loss, {
            name: Metric(value=x, aggregation=AggregationType.SUM)
            for name, x in zip(names, value.tolist(), strict=True)
        }

    def _part(
        self, row: _Row, layer: int, q: Tensor, k: Tensor
    ) -> tuple[slice, tuple[Tensor, Tensor, rk.AttentionSnapshot]] | None:
        """(which of the row's response tokens are here, (q, k, reference) of them), or None."""
        offset = 0
        if self.use_ulysses_sp:
            offset = torch.distributed.get_rank(self.ulysses_parallel_group) * q.shape[2]
        first, last = max(row.first, offset), min(row.last, offset + q.shape[2])
        if first >= last:
            return None
        if row.key not in self._snapshots:
            raise RuntimeError(
                "ral.engines.verl: each row of an update must have gone through the forward of old "
                "log-probabilities on the same process; got one that has not. "
                "algorithm.rollout_correction.bypass_mode must be false"
            )
        reference = self._snapshots[row.key][layer]
        if reference.device != q.device:
            reference = reference.to(q.device)
        own = slice(first - row.first, last - row.first)
        if own != slice(0, row.last - row.first):
            reference = rk.AttentionSnapshot(
                reference.q[:, :, own],
                reference.k[:, :, : last - row.start],
                scale=reference.scale,
                window=(reference.window_left, reference.window_right),
                softcap=reference.softcap or None,
            )
        here = slice(row.batch, row.batch + 1)
        rows = q[here, :, first - offset : last - offset]
        return own, (rows, k[here, :, row.start : last], reference)

    def _gathered(self, x: Tensor) -> Tensor:
        """[B, H, N, D] of all processes of a sequence, of which `x` has [B, H, N / W, D]."""
        if not self.use_ulysses_sp:
            return x
        from torch.distributed.nn.functional import all_gather

        return torch.cat(all_gather(x.contiguous(), self.ulysses_parallel_group), dim=2)


# -- Qwen2-VL and Qwen2.5-VL, whose attention verl replaces ---------------------------------------

_running: list[nn.Module] = []  # attention modules whose forward runs


def _record_qwen2_vl() -> None:
    """Have verl's forward of their attention record q and k: it calls flash attention itself."""
    if hasattr(qwen2_vl.qwen2_vl_attn_forward, "__wrapped__"):
        return
    forward, flash = qwen2_vl.qwen2_vl_attn_forward, qwen2_vl._custom_flash_attention_forward

    @functools.wraps(forward)
    def attn_forward(self: nn.Module, *args: Any, **named: Any) -> Any:
        _running.append(self)
        try:
            return forward(self, *args, **named)
        finally:
            _running.pop()

    @functools.wraps(flash)
    def recorded_flash(query_states: Tensor, key_states: Tensor, *args: Any, **named: Any) -> Any:
        if _running:
            module: Any = _running[-1]
            # They are [B, N, H, D], and each key head is repeated for its query heads.
            key_heads = key_states[:, :, :: module.num_key_value_groups]
            rk.record_attention(
                module,
                query_states.transpose(1, 2),
                key_heads.transpose(1, 2),
                scaling=named.get("softmax_scale"),
                sliding_window=named.get("sliding_window"),
                softcap=named.get("softcap"),
                is_causal=named.get("is_causal"),
            )
        return flash(query_states, key_states, *args, **named)

    qwen2_vl.qwen2_vl_attn_forward = attn_forward
    qwen2_vl._custom_flash_attention_forward = recorded_flash
