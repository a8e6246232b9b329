"""Dual Diffusion's transformer, SD3 without pooled text and with a text head (arXiv 2501.00289). Its class is in no
library; its folders are read into `MMDiT`."""

from __future__ import annotations

from imgdit.families.sd3 import FAMILY as SD3
from imgdit.family import AsMMDiT, Family

assert SD3.as_mmdit is not None
FAMILY = Family(
    classes=("SD3JointModelFlexible",),
    places=SD3.places,
    as_mmdit=AsMMDiT(
        fixed={
            **SD3.as_mmdit.fixed,
            "context_pre_only": False,
            "pooled_projection_dim": None,
            "text_rope_axis": None,
            "null_image_tokens": 8,
        },
        names=tuple(name for name in SD3.as_mmdit.names if name != "pooled_projection_dim"),
        check=SD3.as_mmdit.check,
        defaults_of="SD3Transformer2DModel",
        renamed={"text_vocab_size": "vocab_size"},
        weights={"image_norm_out.": "norm_out.", "image_proj_out.": "proj_out."},
    ),
)
