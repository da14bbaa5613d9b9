"""Terms that a trainer adds to its loss: RAL, attention distillation, exploration, and your own.

`RALTrainer(terms=[...])` takes them. Nothing here uses TRL, so another engine can run `Terms`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

import ral_kernels as rk

from . import losses, schedule
from .losses import PolicyView
from .references import References, Rows

if TYPE_CHECKING:
    from .config import RALConfig  # which imports TRL

Role = Literal["old", "ref", "teacher"]
Layers = int | list[int] | tuple[int, ...] | str


@dataclass(frozen=True)
class Batch:
    """A micro-batch of the update, as a term sees it: B rollouts, C response tokens, N keys.

    Attributes:
        captured: what the term captures of the policy's forward, by default an `rk.Capture`.
        layers: the numbers of the term's layers.
        references: what its `take` gave of these rollouts, by layer; empty without a reference.
        advantages: float32 [B, C], or [B, 1] where a response has one.
        mask: bool [B, C], the response tokens that count.
        weights: float32 [B, C], the share of each token in the mean over an optimizer step
            (`attn_reduction`); 0 outside of the mask. A mean of x is `(weights * x).sum()`.
        num_tokens: by how many tokens a mean over tokens divides the sum over this micro-batch.
        accumulated: how many micro-batches are added in an optimizer step.
        view: rows, spans, scope and divergence that the settings ask for.
        inputs: the trainer's own tensors of the micro-batch.
        model, teacher: the policy and the teacher, as the trainer has wrapped them; the teacher is
            None without one.
    """

    captured: Any
    layers: list[int]
    references: Mapping[int, Any]
    advantages: Tensor
    mask: Tensor
    weights: Tensor
    num_tokens: Tensor | float
    view: PolicyView
    inputs: Mapping[str, Any]
    model: nn.Module | None = None
    teacher: nn.Module | None = None
    accumulated: int = 1


class Captures(AbstractContextManager[Any], Protocol):
    """What `Term.capture` returns, as `rk.capture` does: open it for the forwards of a model."""

    @property
    def layers(self) -> list[int]:
        """The numbers of its layers."""

    def clear(self) -> None:
        """Forget the forwards so far."""


class Term(ABC):
    """A term of the loss, `coefficient` times a scalar of the captured forward.

        class LookAtPictures(Term):
            name = "pictures/loss"

            def loss(self, batch):
                ...

    A subclass says what the term compares with in class attributes, in `capture` and in `take`.

    Attributes:
        name: under which the scalar is logged, without the coefficient; one name for each term.
        reference: None, or whose forward over the rollouts `take` sees: "old", the policy that
            wrote them; "ref", TRL's reference model; or "teacher".
        rows: the query of a response token, as `attn_rows`; None = that of the settings.
        on_attention: whether the term counts in `attn/grad_share`.
        coefficient: its weight; with 0 the term is not in the loss, and only its metrics are taken.
        layers: as in `rk.capture`; None = `attn_layers`.

    Raises:
        ValueError: the coefficient is negative or not finite, or an attribute has an unknown value.
    """

    name: str
    reference: Role | None = None
    rows: losses.Which | None = None
    on_attention = True

    def __init__(self, coefficient: float = 1.0, *, layers: Layers | None = None) -> None:
        self.coefficient, self.layers = coefficient, layers
        kind = type(self).__name__
        if not 0 <= coefficient < float("inf"):
            raise ValueError(f"{kind}: coefficient must be finite and >= 0; got {coefficient!r}")
        for attribute, known in (("reference", get_args(Role)), ("rows", get_args(losses.Which))):
            value = getattr(self, attribute)
            if value not in (None, *known):
                raise ValueError(
                    f"{kind}: {attribute} must be None or one of {', '.join(known)}; got {value!r}"
                )
        if not isinstance(getattr(self, "name", None), str):
            raise ValueError(f"{kind}: name must be the text that it is logged under; got none")

    def capture(self, model: nn.Module, layers: Layers) -> Captures:
        """What is captured of a model's forwards. Terms that do not override it share one."""
        captures: Captures = rk.capture(model, layers)
        return captures

    def take(self, captured: Any, layer: int, view: PolicyView) -> Rows:
        """What is kept of one forward of the reference, without gradients.

        Args:
            captured: that forward, as `capture` has it.
            layer: the number of one of its layers.
            view: rows and spans of the forward's rollouts.

        Returns:
            Rows of its b rollouts, as `References` keeps them; by default a snapshot of the view's
            rows, without noise. Terms that override neither method nor layers and rows share it.
        """
        taken: rk.AttentionSnapshot = captured.snapshot(layer=layer, rows=view.rows, steered=False)
        return taken

    def coefficient_at(self, step: int, steps: int) -> float:
        """The coefficient of an optimizer step; by default the same in all.

        It may depend on these alone, so that a resumed run goes on as it was.

        Args:
            step: optimizer steps so far.
            steps: those of the whole run.
        """
        return self.coefficient

    @abstractmethod
    def loss(self, batch: Batch) -> Tensor:
        """The term's value in a micro-batch: a float32 scalar, a sum over `batch.weights`."""

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        """More to log, from the first micro-batch of a step and without gradients.

        Returns:
            By name, [sum, count] of this process; the mean over all processes is logged.
        """
        return {}


class _FromReference(Term):
    """A divergence of the policy from a reference, by layer."""

    measures = True

    def metrics(self, batch: Batch) -> dict[str, Tensor]:
        if not self.measures:
            return {}
        view = batch.view.measured
        of_batch = losses.mean_divergence(batch.captured, batch.references, batch.mask, view)
        return {"attn/divergence": of_batch}


class AttentionLoss(_FromReference):
    """RAL, eq. (2): the mean of advantage times divergence from a reference policy.

    Args:
        coefficient, layers: as in `Term`; λ.
        reference: with whom the policy is compared.
    """

    name = "attn/loss"

    def __init__(
        self, coefficient: float = 1.0, *, layers: Layers | None = None, reference: Role = "old"
    ) -> None:
        self.reference = reference
        super().__init__(coefficient, layers=layers)

    def loss(self, batch: Batch) -> Tensor:
        weights = batch.weights * batch.advantages
        return losses.weighted_divergence(batch.captured, batch.references, weights, batch.view)


class AttentionDistillation(_FromReference):
    """The attention term of eq. (4): the mean divergence from the teacher.

    Args:
        coefficient, layers: as in `Term`; γ.
        measures: whether it logs `attn/divergence`.
    """

    name = "distill/attention"
    reference: Role | None = "teacher"

    def __init__(
        self, coefficient: float = 1.0, *, layers: Layers | None = None, measures: bool = True
    ) -> None:
        self.measures = measures
        super().__init__(coefficient, layers=layers)

    def loss(self, batch: Batch) -> Tensor:
        return losses.weighted_divergence(
            batch.captured, batch.references, batch.weights, batch.view
        )


class Exploration(Term):
    """The mean of advantage times cross entropy from the policy under the rollouts' noise."""

    name = "explore/loss"

    def loss(self, batch: Batch) -> Tensor:
        weights = batch.weights * batch.advantages
        return losses.exploration_loss(batch.captured, batch.layers, weights, batch.view)


def check_terms(terms: Sequence[Term]) -> None:
    """Check that these are terms of different names.

    Raises:
        TypeError: something else than a `Term`.
        ValueError: two terms of one name.
    """
    for term in terms:
        if not isinstance(term, Term):
            raise TypeError(f"RALTrainer: terms must hold Term objects; got {type(term).__name__}")
    names = [term.name for term in terms]
    if len(set(names)) < len(names):
        raise ValueError(f"RALTrainer: terms must have different names; got {', '.join(names)}")


def check_references(terms: Sequence[Term], config: RALConfig, teacher: Any) -> None:
    """Check that `RALTrainer` has what the terms compare with.

    Raises:
        TypeError: as of `check_terms`.
        ValueError: a teacher is missing or not needed, or TRL runs no forward of that role.
    """
    check_terms(terms)
    users = {term.reference: term.name for term in terms}
    if "teacher" in users and teacher is None:
        raise ValueError(
            "RALTrainer: teacher_model must be given for distill_logit_coef > 0, distill_attn_coef "
            f"> 0, attn_reference='teacher' or terms of a teacher ({users['teacher']}); got None"
        )
    if teacher is not None and "teacher" not in users:
        raise ValueError(
            "RALTrainer: teacher_model needs distill_logit_coef > 0, distill_attn_coef > 0, "
            "attn_reference='teacher' or terms of a teacher; got a teacher that nothing compares "
            "with"
        )
    if "ref" in users and config.beta == 0:
        raise ValueError(
            f"RALTrainer: the reference 'ref' of {users['ref']} needs beta > 0, for which TRL "
            "keeps its reference model; got beta=0"
        )
    if "old" in users and not schedule.runs_old_policy(config):
        raise ValueError(
            f"RALTrainer: the reference 'old' of {users['old']} needs more than one optimizer step "
            "on a rollout batch, for which TRL runs the policy that wrote it: num_iterations >= 2, "
            "or steps_per_generation > gradient_accumulation_steps; got num_iterations="
            f"{config.num_iterations}, steps_per_generation={config.steps_per_generation} and "
            f"gradient_accumulation_steps={config.gradient_accumulation_steps}"
        )


class Terms:
    """The terms of a run, with their captures and references: what a trainer of any kind calls.

        with terms.taking("old", model, view):      # for each rollout batch
            model(...)                              # in one forward or several
        with terms.capturing(model) as captured:    # for each micro-batch
            logits = model(...)
        for term, seen in terms.seen(captured, batch, index):
            loss = loss + term.coefficient_at(step, steps) * term.loss(seen)

    Args:
        terms: in the order of their sum.
        model: the policy, as `rk.capture` takes it.
        layers: for terms without layers of their own.
        references: where to keep what they compare with. Terms that only differ in their loss
            share what is kept, by the name of its role.

    Attributes:
        layers: the numbers of `layers`.
        roles: whose forwards are taken.

    Raises:
        TypeError: something else than a `Term`.
        ValueError: two terms of one name, or layers that the model does not have.
    """

    def __init__(
        self, terms: Sequence[Term], model: nn.Module, layers: Layers, references: References
    ) -> None:
        check_terms(terms)
        self.layers: list[int] = rk.capture(model, layers).layers
        self.roles = {term.reference for term in terms if term.reference is not None}
        self._references = references
        self._placed = [_Placed.of(term, model, layers) for term in terms]

    def __len__(self) -> int:
        return len(self._placed)

    @property
    def terms(self) -> list[Term]:
        """In the order of their sum."""
        return [each.term for each in self._placed]

    def pair(self, role: Role, pair: Callable[[Term, list[int]], list[int]]) -> None:
        """Take other layers of a reference than those of the same numbers.

        Args:
            role: whose.
            pair: from a term and its layers to the reference's, side by side.
        """
        for each in self._placed:
            if each.term.reference == role:
                each.reference_layers = pair(each.term, each.layers)

    @contextmanager
    def taking(self, role: Role, model: nn.Module, view: PolicyView) -> Iterator[None]:
        """Keep what the terms take of each forward of `model`, for its rollouts in their order."""
        chosen = {each.kept_as: each for each in self._placed if each.term.reference == role}
        taken: dict[str, dict[int, list[Rows]]] = {name: {} for name in chosen}
        with ExitStack() as stack:
            captured = _opened(
                stack,
                model,
                [(e.capture_name, e.capture, e.reference_layers) for e in chosen.values()],
            )

            @torch.no_grad()
            def take(*_: Any) -> None:
                for name, each in chosen.items():
                    for ours, theirs in zip(each.layers, each.reference_layers, strict=True):
                        rows = each.term.take(
                            captured[each.capture_name], theirs, each.view_of(view)
                        )
                        taken[name].setdefault(ours, []).append(rows)
                # A rollout batch runs in several forwards: all of their q and k would take as much
                # memory as the activations of a layer.
                for captures in captured.values():
                    captures.clear()

            stack.callback(model.register_forward_hook(take).remove)
            yield
        for name, of_layers in taken.items():
            self._references.add(name, of_layers)

    @contextmanager
    def capturing(self, model: nn.Module) -> Iterator[Mapping[str, Any]]:
        """Capture what the terms need of a forward, and the attention of `layers` in any case.

        Yields:
            What `seen` takes; under `ATTENTION` it has an `rk.Capture`.
        """
        wanted = [(each.capture_name, each.capture, each.layers) for each in self._placed]
        with ExitStack() as stack:
            yield _opened(stack, model, [(ATTENTION, rk.capture, self.layers), *wanted])

    def seen(
        self, captured: Mapping[str, Any], batch: Batch, index: Tensor
    ) -> list[tuple[Term, Batch]]:
        """Each term, and the micro-batch as it sees it.

        Args:
            captured: what `capturing` yielded.
            batch: what the terms have in common.
            index: int64 [B], the numbers of its rollouts.
        """
        return [
            (
                each.term,
                replace(
                    batch,
                    captured=captured[each.capture_name],
                    layers=each.layers,
                    references=self._references.of(each.kept_as, index, batch.mask.device)
                    if each.term.reference is not None
                    else {},
                    view=each.view_of(batch.view),
                ),
            )
            for each in self._placed
        ]


ATTENTION = "attention"  # the capture that terms share
_Capture = Callable[[nn.Module, Any], Any]


@dataclass
class _Placed:
    """A term with its layers: their numbers, and those that stand for them in the reference."""

    term: Term
    capture: _Capture
    capture_name: str
    kept_as: str  # the name in `References`
    layers: list[int]
    reference_layers: list[int]

    @classmethod
    def of(cls, term: Term, model: nn.Module, default_layers: Layers) -> _Placed:
        kind, own = type(term), term.layers is not None or term.rows is not None
        captures_alike = kind.capture is Term.capture
        own = own or not captures_alike or kind.take is not Term.take
        numbers = term.capture(model, default_layers if term.layers is None else term.layers).layers
        return cls(
            term=term,
            capture=rk.capture if captures_alike else term.capture,
            capture_name=ATTENTION if captures_alike else term.name,
            kept_as=f"{term.reference} of {term.name}" if own else str(term.reference),
            layers=numbers,
            reference_layers=numbers,
        )

    def view_of(self, view: PolicyView) -> PolicyView:
        return view if self.term.rows is None else view.at(self.term.rows)


def _opened(
    stack: ExitStack, model: nn.Module, wanted: Sequence[tuple[str, _Capture, list[int]]]
) -> dict[str, Any]:
    """Captures by name, each of all layers that were asked for under its name."""
    layers: dict[str, set[int]] = {}
    for name, _, numbers in wanted:
        layers.setdefault(name, set()).update(numbers)
    captures = {name: capture for name, capture, _ in wanted}
    return {
        name: stack.enter_context(capture(model, sorted(layers[name])))
        for name, capture in captures.items()
    }
