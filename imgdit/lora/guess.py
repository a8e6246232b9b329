"""The family of transformers that a LoRA belongs to, by the names of its modules and by rows per column of its layers.

What tells a family stands in its record (`LoraNames.marks`, `shares`, `never`, `ratios`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from imgdit.family import LoraNames, families

_STRANGERS = (
    (r"(down|up)_blocks[._]|(in|out)put_blocks[._]|mid(dle)?_block", "Stable Diffusion 1, 2 or XL (a U-Net)"),
    (r"transformer_blocks[._]\d+[._]attn1[._]", "PixArt, Sana or Lumina"),
    (r"\bblocks[._]\d+[._](self_attn|cross_attn|ffn)", "Wan"),
)
"""Names of models that have no record."""
_LANGUAGE_MODEL = r"layers[._]\d+[._](self_attn|mlp)[._]"


def _found(pattern: str, modules: Iterable[str]) -> bool:
    return bool(pattern) and any(re.search(pattern, name) for name in modules)


def families_of(modules: Iterable[str], ratios: Mapping[str, float] | None = None) -> tuple[LoraNames, ...]:
    """The families whose modules may be called so: those with a name that only they have, otherwise those that share
    the names; none where the names do not tell.

    Args:
        modules: names by any dialect, without prefix.
        ratios: rows per column of modules, where they are known: FLUX.1 and FLUX.2 give the same names to layers of
            other shapes.
    """
    modules = list(modules)
    known = [family.lora for family in families() if family.lora is not None and family.lora.label]
    known = [names for names in known if not _found(names.never, modules)]
    marked = [names for names in known if _found(names.marks, modules)]
    return tuple(marked or (names for names in known if _found(names.shared, modules) and _fits(names, ratios or {})))


def _fits(names: LoraNames, ratios: Mapping[str, float]) -> bool:
    """Whether the layers have the family's shapes."""
    for name, ratio in ratios.items():
        for pattern, expected in names.ratios.items():
            if re.search(pattern, name) and abs(ratio / expected - 1) > 0.01:
                return False
    return True


def family_of(modules: Iterable[str], ratios: Mapping[str, float] | None = None) -> str | None:
    """What to call the family of transformers whose modules are called so, or the families that it may be; `None`
    where the names do not tell."""
    modules = list(modules)
    stranger = next((label for pattern, label in _STRANGERS if _found(pattern, modules)), None)
    if stranger is not None:
        return stranger
    labels = [names.label for names in families_of(modules, ratios)]
    *others, last = labels or ["a language model" if _found(_LANGUAGE_MODEL, modules) else ""]
    return f"{', '.join(others)} or {last}" if others else last or None
