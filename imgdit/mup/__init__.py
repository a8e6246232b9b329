"""μP: hyper-parameters that transfer from small to large models (arXiv 2505.15270)."""

from .roles import MupMixin, ParameterRule, init_weights, mup_table, param_groups

__all__ = ["MupMixin", "ParameterRule", "init_weights", "mup_table", "param_groups"]
