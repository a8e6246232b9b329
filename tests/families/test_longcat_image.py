"""LongCat-Image beside what all families have: its editing model's reference image, prompts of any length."""

import tiny_flux_kin
import torch
from tiny_control import image
from tiny_families import differs, loaded, near, random

from imgdit import Condition

CASE = tiny_flux_kin.CASES["LongCat-Image"]


def call(text):
    """Of the editing pipeline: image and reference image begin behind the text."""
    grid = torch.stack(torch.meshgrid(torch.arange(4.0), torch.arange(4.0), indexing="ij"), dim=-1).flatten(0, 1)
    ids = [torch.cat([torch.full((16, 1), modality), grid + text], dim=1) for modality in (1.0, 2.0)]
    return {
        "hidden_states": random(1, 32, 64),
        "encoder_hidden_states": random(1, text, 24, seed=4),
        "timestep": torch.tensor([0.6]),
        "txt_ids": torch.arange(text)[:, None].float() * torch.tensor([0.0, 1.0, 1.0]),
        "img_ids": torch.cat(ids).double(),
        "return_dict": False,
    }


@torch.no_grad()
def test_conditions_in_the_editing_model(tmp_path):
    control = loaded(CASE, CASE.pipeline(), tmp_path)
    model, calls = control.transformer, [call(6), call(9)]
    for given in calls:
        near(CASE.dense(model, given), model(**given)[0])
    for mode in ("joint", "independent"):
        with control.use([Condition(image(), "canny", strength=0.5)], mode=mode):
            for given in calls * 2:
                near(model(**given)[0], CASE.dense(model, given, control.run.conditions))
            if mode == "independent":
                assert len(control.run._kept.caches) == 1  # prompts of other lengths share it


@torch.no_grad()
def test_a_reference_may_be_left_out(tmp_path):
    control = loaded(CASE, CASE.pipeline(), tmp_path)
    model, joined = control.transformer, call(6)
    alone = joined | {"hidden_states": joined["hidden_states"][:, :16], "img_ids": joined["img_ids"][:16]}
    expected, stock = model(**alone)[0], model(**joined)[0][:, :16]
    with control.references(strength=0.0):
        near(model(**joined)[0][:, :16], expected)
    with control.references(strength=0.5):
        weak = model(**joined)[0][:, :16]
    differs(weak, expected)
    differs(weak, stock)
