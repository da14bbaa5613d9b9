"""A trainer that keeps what its rollouts were, to compare vLLM's numbers with any weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ral import RALTrainer
from ral.rollouts import agreement
from tests.trainer import tiny

# A rollout batch of 8 and one of its optimizer steps, twice.
SETTINGS: dict[str, Any] = {
    "use_vllm": True, "vllm_mode": "colocate", "vllm_gpu_memory_utilization": 0.1,
    "vllm_max_model_length": 512, "per_device_train_batch_size": 8, "steps_per_generation": 1,
    "num_iterations": 2, "num_generations": 4, "learning_rate": 5e-3,
    # TRL's default is the ratio of whole responses: over 8 tokens, bfloat16 moves it by 5 %.
    "vllm_importance_sampling_mode": "token_truncate",
}  # fmt: skip


class Keeps(RALTrainer):
    """RALTrainer that keeps each rollout batch and the forward that gave its log-probabilities."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.batches: list[dict[str, Any]] = []
        self.forwards: list[tuple[Any, Any]] = []
        super().__init__(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: Any) -> Any:
        output = super()._generate_and_score_completions(inputs)
        self.batches.append(dict(output))
        return output

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._rolling_out:
            self.forwards.append((args, kwargs))
        return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)

    def agreement_of(self, batch: int) -> float:
        """Of vLLM with the model that a rollout batch was made by."""
        return self._agreement(batch, self.batches[batch]["old_per_token_logps"])

    def agreement_with(self, batch: int, weights: dict[str, Tensor]) -> float:
        """Of vLLM in a rollout batch with the model under other weights."""
        model = self.accelerator.unwrap_model(self.model)
        own = {name: value.clone() for name, value in model.state_dict().items()}
        args, kwargs = self.forwards[batch]
        try:
            model.load_state_dict(weights)
            with torch.no_grad():
                found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        finally:
            model.load_state_dict(own)
        return self._agreement(batch, found[0])

    def _agreement(self, batch: int, ours: Tensor) -> float:
        kept = self.batches[batch]
        return agreement(ours, kept["sampling_per_token_logps"], kept["completion_mask"])

    def weights(self) -> dict[str, Tensor]:
        model = self.accelerator.unwrap_model(self.model)
        return {name: value.clone() for name, value in model.state_dict().items()}


def trainer(path: Path, tmp_path: Path, **settings: Any) -> Keeps:
    made = tiny.trainer(path, tmp_path, trainer_class=Keeps, **{**SETTINGS, **settings})
    assert isinstance(made, Keeps)
    return made
