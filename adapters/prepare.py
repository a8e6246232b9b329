"""From what a person asks for to a `ConditionRun`: everything is checked before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from imgdit import compat
from imgdit.adapters.condition import Condition
from imgdit.adapters.encoding import EncodedCondition, encode_conditions, token_format, token_side
from imgdit.adapters.options import ConditionOptions
from imgdit.adapters.pairing import UNKNOWN, Target
from imgdit.adapters.references import References
from imgdit.adapters.run import ConditionRun, Progress, at_the_start
from imgdit.family import Block, find_family
from imgdit.images.fitting import SHARP
from imgdit.images.masks import to_mask
from imgdit.lora.files import AdapterInfo, loaded_adapters
from imgdit.lora.rows import refuse_disabled, refuse_fused


def prepare_run(
    pipe: Any,
    model: Any,
    infos: Mapping[str, AdapterInfo],
    conditions: Condition | Sequence[Condition],
    options: ConditionOptions,
    *,
    progress: Callable[[], Progress] | None = None,
    target: Target = UNKNOWN,
    references: References | None = None,
) -> ConditionRun | None:
    """Check the conditions and encode them; `None` if none of them has a strength and there are no references.

    Args:
        pipe: has the autoencoder.
        model: its transformer.
        infos: how each adapter was trained.
        conditions: one or several; a condition of strength 0 is left out.
        options: of the call.
        progress: tells where the sampler is; `None`: whoever asks which conditions act tells it.
        target: what is known of the images that are generated.
        references: settings of the pipeline's own reference images.
    """
    conditions = [one.trained_as(infos.get(one.adapter) or AdapterInfo()) for one in _listed(conditions)]
    modes = _check(model, infos, conditions, options)
    kept = [(item, one) for item, one in zip(conditions, modes) if item.strength > 0]
    if not kept and references is None:
        return None
    model = compat.unwrapped(model)
    side = token_side(model, pipe.vae)
    sees = [_sees(item, one) for item, one in kept]
    lora_layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    cached = any(view == "self" and item.level == "clean" for view, (item, _) in zip(sees, kept))

    def build(target: Target) -> ConditionRun:
        with torch.no_grad():
            encoded = encode_conditions(
                model,
                pipe.vae,
                [item for item, _ in kept],
                sees,
                device=compat.execution_device(pipe),
                generator=options.generator,
                with_empty=options.image_guidance_scale != 1.0,
                target=target,
                sharp={name for name, info in infos.items() if info.task in SHARP},
            )
        if encoded:
            _check_channels(encoded[0].tokens.shape[2], token_format(model).channels(model))
        return ConditionRun(
            encoded,
            options.main_adapters,
            cached=cached and options.cache is not False,
            lora_layers=lora_layers,
            image_guidance_scale=options.image_guidance_scale,
            region=_region(encoded, options.region, side),
            progress=progress or at_the_start,
            side=side,
            samples=target.samples,
            references=references,
            refit=refit,
        )

    def refit(grid: tuple[int, int]) -> ConditionRun:
        if compat.is_offloaded_whole(pipe.vae):
            raise ValueError(
                "the conditions lie over an image of another size, and cannot be encoded again in the middle of a run "
                f"whose models are offloaded; pass height={grid[0] * side} and width={grid[1] * side} to use()"
            )
        return build(replace(target, grid=grid))

    return build(target)


def _listed(conditions: Condition | Sequence[Condition]) -> Sequence[Condition]:
    conditions = (conditions,) if isinstance(conditions, Condition) else conditions
    wrong = [item for item in conditions if not isinstance(item, Condition)]
    if wrong:
        raise ValueError(
            f"conditions are Condition(image, adapter) objects, one or a list; got {type(wrong[0]).__name__}"
        )
    return conditions


def _sees(condition: Condition, mode: str) -> str:
    """What a condition's tokens attend to, as `Frame.sees`."""
    if mode == "independent":
        return "self"
    return "all" if condition.acts_on == "all" else "joint"


def _check_channels(got: int, channels: int) -> None:
    if got != channels:
        raise ValueError(
            f"the transformer takes tokens of {channels} channels, a condition's have {got}: pipelines that join "
            "images by channels (Control, Fill) cannot take conditions"
        )


def _check(
    model: Any,
    infos: Mapping[str, AdapterInfo],
    conditions: Sequence[Condition],
    options: ConditionOptions,
) -> list[str]:
    """Refuse what cannot be right; the mode of each condition."""
    loaded = loaded_adapters(model)
    for name in [condition.adapter for condition in conditions] + list(options.main_adapters or ()):
        if name not in loaded:
            raise ValueError(f"adapter {name!r} is not loaded; loaded are: {', '.join(loaded) or 'none'}")
    if getattr(model, "_parallel_config", None) is not None:
        raise ValueError(
            "context parallelism splits the sequence evenly over the ranks and would cut through a condition; run "
            "conditions on one rank"
        )
    refuse_processors(model)
    family = find_family(model)
    stock = None if family is None else family.conditions
    if stock is not None and stock.sigma is None and any(condition.complement for condition in conditions):
        raise ValueError(
            f"complement=True cannot complete an image with a {type(compat.unwrapped(model)).__name__}; use its "
            "inpainting pipeline, or a condition without complement"
        )
    if stock is not None and stock.clean_only and any(condition.level != "clean" for condition in conditions):
        raise ValueError(
            f"level='image' cannot be had with a {type(compat.unwrapped(model)).__name__}, whose reference images are "
            "at noise level 0; use level='clean'"
        )
    claimed = {condition.adapter for condition in conditions if condition.acts_on == "condition"}
    both = sorted(claimed & {condition.adapter for condition in conditions if condition.acts_on == "all"})
    if both:
        raise ValueError(
            f"adapter {both[0]!r} acts on all tokens for one condition and on the condition's alone for another; "
            "give its conditions the same acts_on"
        )
    refuse_disabled(model, [condition.adapter for condition in conditions])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            refuse_fused(claimed, layer.merged_adapters)
        elif conditions and getattr(layer, "fused_projections", False):
            raise ValueError("adapters on tokens need separate projections; call unfuse_qkv_projections() first")
    chosen = [options.mode or (infos.get(item.adapter) or AdapterInfo()).mode or "joint" for item in conditions]
    if options.cache and not any(
        mode == "independent" and one.level == "clean" for mode, one in zip(chosen, conditions)
    ):
        raise ValueError(
            "cache=True keeps a condition's keys and values over the steps, but in joint mode they depend on the "
            "image that is generated, and at its noise level on the step. These adapters were not trained "
            "independently; pass mode='independent' (and level='clean') to run them so nevertheless"
        )
    return chosen


def blocks_of(model: Any) -> Iterator[Block]:
    """Blocks of a transformer that keeps its own forward, out of `torch.compile`'s wrapper; none of another one."""
    family = find_family(model)
    if family is not None and family.conditions is not None:
        for block in family.conditions.blocks(model):
            yield block._replace(module=compat.unwrapped(block.module))


def refuse_processors(model: Any) -> None:
    """Refuse attention processors of a transformer that keeps its own forward, which conditions would leave out.

    Raises:
        ValueError: a processor is another one than diffusers' own for the model.
    """
    family = find_family(model)
    if family is None or family.conditions is None or not family.conditions.processors:
        return
    accepted = family.conditions.processors
    for block in blocks_of(model):
        for name in block.attentions:
            attention = getattr(block.module, name, None)
            processor = getattr(attention, "processor", None)
            if processor is None or type(processor) in accepted:
                continue
            kind, place = type(processor).__name__, f"{block.name}.{name}"
            if kind in family.conditions.refused:
                raise ValueError(f"{place}.processor is a {kind}: {family.conditions.refused[kind]}")
            if "IPAdapter" in kind:
                raise ValueError(
                    f"{place}.processor is an IP-Adapter's ({kind}), which conditions would leave out; call "
                    "unload_ip_adapter() first"
                )
            raise ValueError(
                f"{place}.processor is a {kind}, which conditions would leave out: they compute the attention over "
                f"text, image and conditions themselves. Call "
                f"{_putting_back(model, attention, place)} first (and pass pag_scale=0 to a PAG pipeline), or run the "
                "pipeline without conditions"
            )


def _putting_back(model: Any, attention: Any, place: str) -> str:
    """The call that gives an attention diffusers' own processor, or all of them where they are of one class."""
    family = find_family(model)
    assert family is not None and family.conditions is not None
    first = family.conditions.processors[0]
    attentions = [getattr(block.module, name, None) for block in blocks_of(model) for name in block.attentions]
    own = (compat.default_processor(attention) or first).__name__
    if len({compat.default_processor(one) or first for one in attentions if one is not None}) == 1:
        return f"transformer.set_attn_processor({own}())"
    return f"transformer.get_submodule({place!r}).set_processor({own}())"


def _region(encoded: Sequence[EncodedCondition], region: Any, side: int) -> torch.Tensor | None:
    """The tokens (rows, columns) that are made; `side` pixels each."""
    complements = [item for item in encoded if item.condition.complement]
    if not complements:
        if region is not None:
            raise ValueError("region= is for conditions with complement=True, which show what lies around it")
        return None
    sizes = {item.frame.size for item in complements}
    if len(sizes) > 1:
        raise ValueError(f"complement conditions show one image, got sizes of {sorted(sizes)} tokens")
    known = torch.stack([item.frame.mask for item in complements if item.frame.mask is not None]).any(0)
    generated = ~known if region is None else to_mask(region, complements[0].frame.size, side)
    if not generated.any():
        raise ValueError("the complement conditions' masks cover the whole image: there is nothing to generate")
    return generated
