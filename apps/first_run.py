"""The first run: a tiny model, trained on the spot on coloured shapes, makes a picture sheet.

It shows that the whole path works (autoencoder, text encoder, backbone, schedule, pipeline, files); it is no more than
that. Everything comes from the library; only the shapes are made here.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image, ImageDraw
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from imgdit import DiffusionPipeline, Frame, FrameLayout, ImgDiTPipeline, MMDiT, MultiFrameFlowMatchScheduler
from imgdit.models.functional import pack
from imgdit.mup import param_groups
from imgdit.schedulers.flow_match import mix, velocity

COLOURS = {"red": (220, 50, 47), "green": (60, 170, 70), "blue": (50, 100, 220), "yellow": (240, 200, 40)}
SHAPES = ("circle", "square", "triangle")
SIDE = 32  # pixels
PROMPTS = tuple(f"a {colour} {shape}" for shape in SHAPES for colour in COLOURS)
LABEL = "imgdit first run: a tiny model, trained on this machine for {steps} steps on coloured shapes"


def render(count: int, generator: torch.Generator) -> tuple[torch.Tensor, list[str]]:
    """Pictures (B, 3, 32, 32) in [-1, 1] of one shape each, and their sentences."""
    kinds = torch.randint(len(SHAPES), (count,), generator=generator)
    names = torch.randint(len(COLOURS), (count,), generator=generator)
    radius = torch.empty(count, 1, 1).uniform_(7, 11, generator=generator)
    middle = torch.empty(count, 2, 1, 1).uniform_(12, SIDE - 12, generator=generator)
    grid = torch.stack(torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij"))
    y, x = (grid[None] - middle).unbind(1)
    triangle = torch.maximum(y - 0.7 * radius, x.abs() * 0.87 - y * 0.5 - 0.6 * radius)
    distances = (torch.hypot(x, y) - radius, torch.maximum(x.abs(), y.abs()) - 0.85 * radius, triangle)
    distance = torch.stack(distances, dim=1)[torch.arange(count), kinds]
    cover = (0.5 - distance).clamp(0, 1)[:, None]  # half a pixel of soft edge
    colour = torch.tensor(list(COLOURS.values()), dtype=torch.float32)[names][..., None, None]
    pixels = cover * colour + (1 - cover) * 235.0
    return pixels / 127.5 - 1, [f"a {list(COLOURS)[n]} {SHAPES[k]}" for n, k in zip(names, kinds)]


def _tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "</s>", "<unk>", "a", *COLOURS, *SHAPES]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


def build() -> ImgDiTPipeline:
    """The untrained pipeline. Its text encoder stays random: a dozen words need no more than distinct vectors."""
    tokenizer = _tokenizer()
    text = T5Config(
        vocab_size=len(tokenizer), d_model=64, d_kv=16, d_ff=128, num_heads=4, num_layers=1, dropout_rate=0.0
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=SIDE,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    transformer = MMDiT(
        in_channels=16,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=64,
        axes_dims_rope=(8, 12, 12),
        sample_size=SIDE // 2,
    )
    transformer.init_weights()
    return ImgDiTPipeline(MultiFrameFlowMatchScheduler(), vae, T5EncoderModel(text).eval(), tokenizer, transformer)


def train(pipe: ImgDiTPipeline, steps: int, seed: int) -> None:
    """Teach the autoencoder, then the backbone, each with a rate that falls to zero."""
    generator = torch.Generator().manual_seed(seed)
    vae, transformer = pipe.vae, pipe.transformer
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3)
    half = steps // 2
    for i in tqdm(range(half), desc="autoencoder"):
        pixels, _ = render(16, generator)
        posterior = vae.encode(pixels).latent_dist
        restored = vae.decode(posterior.sample(generator)).sample
        loss = F.mse_loss(restored, pixels) + 1e-4 * posterior.kl().mean() / SIDE**2
        _step(loss, optimizer, vae, 1 - i / half)
    vae.requires_grad_(False).eval()
    sample = vae.encode(render(256, generator)[0]).latent_dist.mode()
    vae.register_to_config(scaling_factor=1 / sample.std().item(), shift_factor=sample.mean().item())

    optimizer = torch.optim.AdamW(param_groups(transformer, lr=2e-3), betas=(0.9, 0.95))
    layout = FrameLayout.build([Frame((8, 8))], 4)
    for i in tqdm(range(steps), desc="backbone"):
        pixels, prompts = render(32, generator)
        with torch.no_grad():
            latents = (vae.encode(pixels).latent_dist.mode() - vae.config.shift_factor) * vae.config.scaling_factor
            dropped = torch.rand(len(prompts), generator=generator) < 0.1
            text, _, pooled, *_ = pipe.encode_prompt(
                ["" if drop else prompt for drop, prompt in zip(dropped, prompts)], do_classifier_free_guidance=False
            )
            mask = _mask(dropped)
        data = pack(latents, pipe.patch_size)
        noise = torch.randn(data.shape, generator=generator)
        sigmas = pipe.scheduler.sample_sigmas(len(data), generator=generator)
        predicted = transformer(
            mix(data, noise, sigmas, layout.lengths), text, pooled, sigmas, layout=layout, encoder_attention_mask=mask
        ).sample
        _step(F.mse_loss(predicted, velocity(data, noise)), optimizer, transformer, min(1.0, i / 20) * (1 - i / steps))
    transformer.eval()


def _mask(dropped: torch.Tensor) -> torch.Tensor:
    """Real text tokens (B, 4): "a", colour, shape, end; only the end of a dropped sentence."""
    return torch.arange(4)[None] < torch.where(dropped, 1, 4)[:, None]


def _step(loss: torch.Tensor, optimizer: torch.optim.Optimizer, model: torch.nn.Module, rate: float) -> None:
    """One update at `rate` times each group's own learning rate."""
    for group in optimizer.param_groups:
        group.setdefault("base_lr", group["lr"])
        group["lr"] = group["base_lr"] * rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def sheet(pictures: list[Image.Image], prompts: list[str], title: str, columns: int = 4) -> Image.Image:
    """The pictures four times as large, each over its sentence."""
    side, line, margin = 4 * SIDE, 18, 10
    columns = max(min(columns, len(pictures)), 4)
    rows = -(-len(pictures) // columns)
    page = Image.new(
        "RGB", (margin + columns * (side + margin), margin + line + rows * (side + line + margin)), "white"
    )
    draw = ImageDraw.Draw(page)
    draw.text((margin, margin // 2), title, fill="black")
    for i, (picture, prompt) in enumerate(zip(pictures, prompts)):
        x = margin + (i % columns) * (side + margin)
        y = margin + line + (i // columns) * (side + line + margin)
        page.paste(picture.resize((side, side), Image.Resampling.BICUBIC), (x, y))
        draw.text((x, y + side + 2), prompt, fill="black")
    return page


def main(prompts: list[str], out: Path, steps: int, seed: int) -> Path:
    """Train if there is no model yet, load it as anybody would, make the sheet.

    Raises:
        ValueError: a sentence with a word the model was not taught, or no steps to train.
    """
    taught = {"a", *COLOURS, *SHAPES}
    for prompt in prompts:
        for word in prompt.split():
            if word not in taught:
                raise ValueError(f"the tiny model knows only {', '.join(sorted(taught))}; got {word!r} in {prompt!r}")
    if steps < 2:
        raise ValueError(f"at least 2 steps of training are needed, got {steps}")
    folder = out / "model"
    if not (folder / "model_index.json").exists():
        # The operations are so small that a second thread mostly waits, and waits long where the core is shared.
        torch.set_num_threads(1)
        torch.manual_seed(seed)
        pipe = build()
        train(pipe, steps, seed)
        pipe.save_pretrained(folder)
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(desc="sampling")
    pictures = pipe(prompts, num_inference_steps=20, guidance_scale=3.0, generator=torch.manual_seed(seed)).images
    path = out / "sheet.png"
    sheet(pictures, prompts, LABEL.format(steps=steps)).save(path)
    return path
