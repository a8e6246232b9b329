"""A tiny vision-language pipeline: tiles of 2x2 tokens, and the tokenizer of the recordings."""

import torch
from PIL import Image
from tiny_text import make_model
from transformers import PreTrainedTokenizerFast, SiglipVisionConfig, SiglipVisionModel
from vision_cases import FIXTURES, RECORDS

from imgdit.models.image_tokens import ImageProjector
from imgdit.pipelines.vision_language import LaViDaPipeline
from imgdit.schedulers.masked_text import MaskedTextScheduler

SPECIAL = RECORDS["lavida"]["meta"]["special_ids"]
VOCABULARY = 352


def make_tower(hidden_size: int = 16) -> SiglipVisionModel:
    config = SiglipVisionConfig(
        hidden_size=hidden_size, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28,
        patch_size=14, vision_use_head=False,
    )  # fmt: skip
    return SiglipVisionModel(config).eval()


def make_projector(**changes) -> ImageProjector:
    settings = {
        "vision_size": 16, "hidden_size": 32, "image_size": 28, "patch_size": 14,
        "grids": [[28, 56], [56, 28], [56, 56]],
    }  # fmt: skip
    return ImageProjector(**settings | changes).eval()


def make_vision_pipe(owner=LaViDaPipeline, projector=None, **settings):
    torch.manual_seed(0)
    model = make_model(
        vocab_size=VOCABULARY, mask_token_id=SPECIAL["mask"], eos_token_id=SPECIAL["eos"],
        max_position_embeddings=512,
    )  # fmt: skip
    tokenizer = PreTrainedTokenizerFast.from_pretrained(FIXTURES / "lavida/model")
    scheduler = MaskedTextScheduler(**{"threshold": 2.0} | settings)
    pipe = owner(model, make_tower(), make_projector() if projector is None else projector, scheduler, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def noise_image(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """An image of random pixels."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(values.numpy()).convert(mode)
