"""The terms that the settings of a run ask for."""

from __future__ import annotations

from .config import RALConfig
from .distillation import LogitDistillation
from .objectives import EvidenceLoss, Schedule
from .router import RouterLoss
from .terms import AttentionDistillation, AttentionLoss, Exploration, Term


def terms_of(config: RALConfig) -> list[Term]:
    """The terms that the settings ask for."""
    terms: list[Term] = []
    if config.attn_coef > 0:
        terms.append(AttentionLoss(config.attn_coef, reference=config.attn_reference))
    if config.distill_attn_coef > 0 or (config.needs_teacher and config.attn_coef == 0):
        measures = config.attn_coef == 0
        terms.append(AttentionDistillation(config.distill_attn_coef, measures=measures))
    if config.explores and config.attn_explore_coef > 0:
        terms.append(Exploration(config.attn_explore_coef))
    if config.distill_logit_coef > 0:
        terms.append(LogitDistillation(config))
    if config.router_coef > 0:
        assert config.router_layers is not None  # RALConfig has put all
        terms.append(RouterLoss(config.router_coef, layers=config.router_layers))
    if config.evidence_coef > 0:
        terms.append(
            EvidenceLoss(
                config.evidence_coef,
                layers=config.evidence_layers,
                heads=config.evidence_heads,
                kind=config.evidence_divergence,
                floor=config.evidence_floor,
                schedule=Schedule(config.evidence_schedule, config.evidence_steps),
            )
        )
    return terms
