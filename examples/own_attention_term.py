"""A term of your own beside RAL: good answers that looked at the frames teach to look there.

    python examples/own_attention_term.py
    python -m ral train --preset digits terms=examples/own_attention_term.py:LookAtFrames:0.1

The term is −A · log s, with s the share of attention on pictures and A the advantage of the answer.
"""

import tempfile

import torch

import ral_kernels as rk
from ral import RALConfig, RALTrainer, Term
from ral.digits import load_pretrained
from ral.digits.tasks import make_dataset
from ral.rewards import paper_reward
from ral.terms import Batch


class LookAtFrames(Term):
    """The shares come from the kernels: no map of attention is stored, and they have a gradient."""

    name = "frames/loss"

    def shares(self, batch: Batch) -> torch.Tensor:
        """[B, C], of each response token, the mean over heads and layers."""
        frames = rk.Spans(batch.inputs["visual"].int() - 1, 1)  # span 0; -1 is in no span
        options = {"rows": batch.view.rows, "spans": frames, "head_reduction": "mean"}
        found = [batch.captured.marginals(layer=layer, **options) for layer in batch.layers]
        return torch.cat(found, dim=-1).mean(-1).clamp(min=1e-6)

    def loss(self, batch: Batch) -> torch.Tensor:
        return -(batch.weights * batch.advantages * self.shares(batch).log()).sum()

    def metrics(self, batch: Batch) -> dict[str, torch.Tensor]:
        shares = self.shares(batch)[batch.mask]
        return {"frames/share": torch.stack([shares.sum(), batch.mask.sum()])}


def main() -> None:
    model, processor = load_pretrained()
    config = RALConfig(
        output_dir=tempfile.mkdtemp(), max_steps=4, learning_rate=1e-4, num_iterations=2,
        num_generations=8, per_device_train_batch_size=16, max_completion_length=8, temperature=1.5,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False,
        gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = RALTrainer(
        model, paper_reward, config, processing_class=processor, terms=[LookAtFrames(0.1)],
        train_dataset=make_dataset("timestamp", size=8, frames=8),
    )  # fmt: skip
    trainer.train()
    for entry in trainer.state.log_history[:-1]:
        print(f"step {entry['step']}: share of frames {entry['frames/share']:.3f}", end=", ")
        print(f"term {entry['frames/loss']:+.3g}, RAL {entry['attn/loss']:+.3g}")


if __name__ == "__main__":
    main()
