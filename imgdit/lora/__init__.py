"""LoRA on rows: one product of the base weight over all tokens, each adapter on its own slice."""

from imgdit.lora.rows import (
    AdapterRows,
    LoraPlan,
    acting_on,
    feed_forward,
    linear,
    lora_plan,
    main_rows,
    on_rows,
    refuse_fused,
)

__all__ = [
    "AdapterRows",
    "LoraPlan",
    "acting_on",
    "feed_forward",
    "linear",
    "lora_plan",
    "main_rows",
    "on_rows",
    "refuse_fused",
]
