"""Evaluation during training: rewards and accuracy by type of row, and a file of the answers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

from . import rollouts
from .rewards import accuracy_reward
from .rewards.tags import completion_text

FOLDER = "evaluations"
_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None, "min_p": None}


class Validates(GRPOTrainer):
    """A mixin: what `evaluate` says of the answers to an evaluation set, and keeps of them.

    `evaluate` answers each row `num_generations_eval` times at `eval_temperature`. Metrics, exact
    over the rows, on any number of processes:
        eval_reward, eval_rewards/<function>/mean: mean rewards.
        eval_accuracy: mean of `accuracy_reward`, of rows with solution and problem_type.
        eval_reward/<type>, eval_accuracy/<type>: the same of the rows of a problem_type.

    The main process writes output_dir/evaluations/step-<step>.jsonl, a line for each answer: step,
    problem_id, type, prompt, answer, expected, accuracy, reward, rewards. Evaluation sets by name
    have a file each, step-<step>-<name>.jsonl, and their names in their metrics.

    Training is the same bit for bit with and without, unless vLLM writes the rollouts, whose random
    state moves. Of an evaluation set without a length, the last answers may count twice on several
    processes.
    """

    _answers: list[dict[str, Any]] | None = None  # while an evaluation runs

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """In the order of the rows, unlike TRL's."""
        return RepeatSampler(eval_dataset, self.num_generations_eval, shuffle=False)

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> Any:
        device = self.accelerator.device
        self._answers = []
        try:
            with (
                rollouts.randomness_kept(device),
                at_temperature(self, self.args.eval_temperature),
            ):
                # The same noise each time: what changes between evaluations is the policy.
                torch.manual_seed(self.args.seed + self.accelerator.process_index)
                output = super().evaluation_loop(
                    dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
                )
            answers = self._answers
        finally:
            self._answers = None
        if hasattr(dataloader.dataset, "__len__"):
            # Several processes fill up the last batch from the beginning.
            del answers[len(dataloader.dataset) * self.num_generations_eval :]
        for name in list(self._metrics["eval"]):
            # TRL's are means of batches, however full.
            if name == "reward" or (name.startswith("rewards/") and name.endswith("/mean")):
                del self._metrics["eval"][name]
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in summary(answers).items()}
        )
        if self.accelerator.is_main_process:
            self._write(answers, metric_key_prefix.removeprefix("eval").removeprefix("_"))
        return output

    def _calculate_rewards(
        self, inputs: list[dict[str, Any]], prompts: list[Any], completions: list[Any], *rest: Any
    ) -> Tensor:
        rewards: Tensor = super()._calculate_rewards(inputs, prompts, completions, *rest)
        if self._answers is not None and not self.model.training:
            found = gather_object(described(inputs, prompts, completions))
            weighted = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
            unknown = rewards.isnan().all(1)
            for answer, each, total, none in zip(
                found, rewards.tolist(), weighted.tolist(), unknown.tolist(), strict=True
            ):
                answer["step"] = self.state.global_step
                answer["reward"] = None if none else total
                answer["rewards"] = {
                    name: value if value == value else None  # NaN: the function gave none
                    for name, value in zip(self.reward_func_names, each, strict=True)
                }
                self._answers.append(answer)
        return rewards

    def _write(self, answers: Sequence[dict[str, Any]], name: str) -> None:
        folder = Path(str(self.args.output_dir)) / FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        suffix = f"-{name}" if name else ""
        path = folder / f"step-{self.state.global_step:06d}{suffix}.jsonl"
        lines = (json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        path.write_text("".join(lines), "utf-8")


def described(
    rows: Sequence[dict[str, Any]], prompts: Sequence[Any], completions: Sequence[Any]
) -> list[dict[str, Any]]:
    """What is kept of answers, but for their rewards.

    Args:
        rows: as the dataset has them. Those without solution or problem_type have no accuracy.
        prompts, completions: texts or conversations.
    """
    found = []
    for row, prompt, completion in zip(rows, prompts, completions, strict=True):
        expected, of_type = row.get("solution"), row.get("problem_type")
        accuracy = None
        if expected is not None and of_type is not None:
            (accuracy,) = accuracy_reward([completion], [expected], [of_type], [row.get("options")])
        found.append(
            {
                "step": None,  # in the order that the file has
                "problem_id": row.get("problem_id"),
                "type": of_type,
                "prompt": _text(prompt),
                "answer": completion_text(completion),
                "expected": expected,
                "accuracy": accuracy,
            }
        )
    return found


def summary(answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean rewards and accuracy of all answers, and of those of each type of problem."""
    values: dict[str, list[float]] = defaultdict(list)
    for answer in answers:
        kind = (answer["type"] or "").replace(" ", "_")
        for name in ("reward", "accuracy"):
            if answer[name] is not None:
                values[name].append(answer[name])
                if kind:
                    values[f"{name}/{kind}"].append(answer[name])
        for name, value in answer["rewards"].items():
            if value is not None:
                values[f"rewards/{name}/mean"].append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


@contextmanager
def at_temperature(trainer: Any, temperature: float | None) -> Iterator[None]:
    """Let a GRPO trainer's generation, or its vLLM, sample at another temperature; 0 is greedy.

    Args:
        trainer: TRL's, made.
        temperature: None for that of its rollouts.
    """
    if temperature is None:
        yield
        return
    names = ("temperature",) if trainer.use_vllm else ("generation_config", "generation_kwargs")
    owner = trainer.vllm_generation if trainer.use_vllm else trainer
    kept = {name: getattr(owner, name) for name in names}
    try:
        if trainer.use_vllm:
            owner.temperature = temperature
        else:
            changed = {"temperature": temperature} if temperature > 0 else _GREEDY
            owner.generation_kwargs = {**kept["generation_kwargs"], **changed}
            owner.generation_config = deepcopy(kept["generation_config"])
            for name, value in changed.items():
                setattr(owner.generation_config, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(owner, name, value)


def _text(prompt: Any) -> str:
    """A prompt as text, with `<image>` where an image stands."""
    if isinstance(prompt, str):
        return prompt
    texts = []
    for message in prompt:
        content = message.get("content") or ""
        parts = [{"text": content}] if isinstance(content, str) else content
        texts += [part.get("text") or f"<{part.get('type')}>" for part in parts]
    return "\n".join(texts)
