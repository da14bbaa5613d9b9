"""Terms of the loss that the settings name."""

from __future__ import annotations

from ..terms import Term
from .errors import Refused, refusing
from .settings import TermSettings
from .sources import module_of, weighted


def loss_terms(settings: TermSettings) -> list[Term]:
    """The terms, each made with its coefficient.

    Raises:
        Refused: a name leads to no class of terms, or the class does not take the coefficient.
    """
    return [_term(given) for given in settings.terms or []]


def _term(given: str) -> Term:
    place, coefficient = weighted(given)
    where, colon, name = place.rpartition(":")
    if not colon or not where or not name:
        raise Refused(
            "terms must be file.py:Name or package.module:Name, with :coefficient or without; got "
            + repr(given)
        )
    with refusing(f"terms {given}"):
        made = getattr(module_of(where), name, None)
        if not (isinstance(made, type) and issubclass(made, Term)):
            raise Refused(f"terms must name classes of ral.Term; {where} has no such {name!r}")
        return made(coefficient)
