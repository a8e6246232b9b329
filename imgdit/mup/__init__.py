"""μP: hyper-parameters that transfer from small to large models (arXiv 2505.15270)."""

from imgdit.mup.groups import check_rates, param_groups
from imgdit.mup.roles import (
    MupMixin,
    MupSettings,
    ParameterRule,
    check_settings,
    configure,
    init_weights,
    mup_settings,
    mup_table,
    width_multiplier,
)
from imgdit.mup.structure import Structure, structure_of

__all__ = [
    "MupMixin",
    "MupSettings",
    "ParameterRule",
    "Structure",
    "check_rates",
    "check_settings",
    "configure",
    "init_weights",
    "mup_settings",
    "mup_table",
    "param_groups",
    "structure_of",
    "width_multiplier",
]
