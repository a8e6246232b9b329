"""Everything that reads files of others: a valid input, and how it is read."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from fuzz import mutations
from fuzz.mutations import PATHS, PICKLE, by_name
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import rope_config, tiny_mmdit, tiny_pipeline
from tiny_control import strangers


class Loader(NamedTuple):
    """One kind of input."""

    inputs: int
    """How many are tried in a whole run."""
    make: Callable[[Path], None]
    """Writes a valid one into a folder."""
    load: Callable[[Path], Any]
    """Reads it."""
    change: Callable[[random.Random, Path], None]
    """Makes it wrong."""
    documented: tuple[type[Exception], ...] = (ValueError, OSError)
    """What reading may raise."""


def one_file(rng: random.Random, folder: Path) -> None:
    """One of the files changed; now and then lost, empty, a folder, or a pickle under its own or another name."""
    change_file(rng, rng.choice(sorted(path for path in folder.rglob("*") if path.is_file())))


def change_file(rng: random.Random, path: Path) -> None:
    what = rng.random()
    if what < 0.01:
        path.unlink()
    elif what < 0.02:
        path.unlink()
        path.mkdir()
    elif what < 0.03:
        path.rename(path.with_suffix(rng.choice((".bin", ".pt", ".pth", ".ckpt", ".pkl"))))
    elif what < 0.04:
        path.write_bytes(PICKLE)
        for name in ("pytorch_model.bin", "sae.pt", "state_dict.pth", "model.ckpt"):
            (path.parent / name).write_bytes(PICKLE)
    else:
        path.write_bytes(by_name(path.name)(rng, path.read_bytes()))


# LoRA files


def make_lora(folder: Path) -> None:
    from imgdit.lora.dialects import LoraPair
    from imgdit.lora.files import AdapterInfo, write_adapter

    generator = torch.Generator().manual_seed(0)

    def pair(rows: int, columns: int) -> LoraPair:
        return LoraPair(torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator))

    pairs = {f"transformer_blocks.{i}.attn.to_{part}": pair(32, 32) for i in range(2) for part in "qkv"}
    info = AdapterInfo("tiny", "canny", (0.0, -2.0), 1.0, "joint", 64, "MIT")
    write_adapter(folder / "peft.safetensors", pairs, info)
    write_adapter(folder / "comfyui.safetensors", pairs, info, dialect="comfyui")
    # As diffusers saves it, with PEFT's configuration.
    config = {"transformer.r": 2, "transformer.lora_alpha": 4, "transformer.alpha_pattern": {"attn.to_q": 8}}
    told = {"format": "pt", LORA_ADAPTER_METADATA_KEY: json.dumps(config)}
    save_file(load_file(folder / "peft.safetensors"), folder / "saved.safetensors", metadata=told)
    # Other trainers' names.
    fused = pair(96, 32)
    kohya = {"lora_down.weight": fused.down, "lora_up.weight": fused.up, "alpha": torch.tensor(1.0)}
    named = {f"lora_unet_double_blocks_0_img_attn_qkv.{part}": tensor for part, tensor in kohya.items()}
    save_file(named | {"lora_te1_layers_0_fc1.alpha": torch.tensor(1.0)}, folder / "kohya.safetensors")
    one = pair(32, 32)
    parts = {"lora_down.weight": one.down, "lora_up.weight": one.up, "alpha": torch.tensor(1.0)}
    named = {f"lora_transformer_single_transformer_blocks_0_attn_to_k.{part}": t for part, t in parts.items()}
    save_file(named, folder / "onetrainer.safetensors")
    named = {"down.weight": fused.down, "up.weight": fused.up}
    save_file({f"double_blocks.1.processor.qkv_lora2.{p}": t for p, t in named.items()}, folder / "xlabs.safetensors")
    peft_folder(folder / "trained")


def peft_folder(folder: Path) -> None:
    """As PEFT saves an adapter: the strength stands beside the weights."""
    folder.mkdir()
    tensors = {"lora_A.default.weight": torch.ones(2, 32), "lora_B.default.weight": torch.ones(32, 2)}
    named = {f"base_model.model.transformer_blocks.0.attn.to_v.{part}": tensor for part, tensor in tensors.items()}
    save_file(named, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "use_rslora": True, "init_lora_weights": True}
    config |= {"alpha_pattern": {"to_k": 4, "^transformer_blocks.0.attn.to_v": 6}, "target_modules": ["to_v"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))


class Once:
    """A model that is made when it is first needed."""

    def __init__(self, make: Callable[[], Any]):
        self.make, self.made = make, None

    def get(self) -> Any:
        if self.made is None:
            self.made = self.make()
        return self.made


MODEL = Once(lambda: tiny_mmdit(rope_config()))
PIPE = Once(tiny_pipeline)


def load_lora(folder: Path) -> None:
    attach_all(sorted(path for path in folder.glob("*") if path.name != "adapter_config.json"))


def attach_all(paths: Iterable[Path]) -> None:
    """Read adapters and put them on a model; of one that fails nothing stays."""
    from imgdit.lora.files import attach_adapter, loaded_adapters, read_adapter

    model = MODEL.get()
    for path in paths:
        try:
            attach_adapter(model, read_adapter(path), "a")
        except Exception:
            assert not loaded_adapters(model), loaded_adapters(model)
            raise
        model.delete_adapters("a")


def make_adapters(folder: Path) -> None:
    strangers(folder)
    peft_folder(folder / "trained")


def one_adapter(rng: random.Random, folder: Path) -> None:
    """One of the adapters; the strangers beside them are wrong as they are."""
    names = ("edges-v1.1.safetensors", "style/adapter_model.safetensors", "trained/adapter_model.safetensors")
    change_file(rng, folder / rng.choice((*names, "trained/adapter_config.json")))


def load_adapters(folder: Path) -> None:
    """A folder of adapters: whatever lies in it, the others are found; those that were found may be refused."""
    from imgdit.lora.files import find_adapters

    attach_all(found.path for found in find_adapters(folder).values())
    attach_all([folder / "trained"])


# Sparse autoencoders and their selections


def make_sae(folder: Path) -> None:
    from imgdit.sae.config import SAEConfig
    from imgdit.sae.model import SparseAutoencoder, save_sae

    save_sae(SparseAutoencoder(SAEConfig(32, 16, 4, activation="batch_topk", threshold=0.1)), folder)


def load_one_sae(folder: Path) -> None:
    from imgdit.sae.model import load_sae

    load_sae(folder)


def make_selection(folder: Path) -> None:
    from imgdit.sae.config import SAEConfig
    from imgdit.sae.model import SparseAutoencoder
    from imgdit.sae.unlearning import ConceptUnlearner

    hookpoint = "transformer.transformer_blocks.0"
    learner = ConceptUnlearner({hookpoint: SparseAutoencoder(SAEConfig(32, 16, 4, hookpoint=hookpoint))})
    learner.learn(
        PIPE.get(), {"cube": ["a red cube"], "cone": ["a cone"]}, top_n=2, num_inference_steps=1, height=16, width=16
    )
    learner.save_pretrained(folder)


def load_selection(folder: Path) -> None:
    """Read, and put to use, which is where a wrong selection would do harm."""
    from imgdit.sae.unlearning import ConceptUnlearner

    learner = ConceptUnlearner.from_pretrained(folder)
    for concept in learner.concepts:
        with learner.attach(PIPE.get(), [concept]):
            pass


def one_selection(rng: random.Random, folder: Path) -> None:
    """Mostly the selections, which the sparse autoencoder's files stand beside."""
    files = sorted(folder.rglob("concepts.*"))
    if not files or rng.random() < 0.2:
        return one_file(rng, folder)
    path = rng.choice(files)
    path.write_bytes(by_name(path.name)(rng, path.read_bytes()))


# Runs


def make_run(folder: Path) -> None:
    from training.toy import recipe, toy_train

    arguments = {**rope_config(num_layers=1, num_single_layers=1), "axes_dims_rope": [4, 6, 6]}
    toy_train(recipe(folder, run={"steps": 2}, model={"arguments": arguments}), stop_at=1)


def load_run(folder: Path) -> None:
    from imgdit.training.trained import load_trained

    load_trained(folder)


def resume_run(folder: Path) -> None:
    from training.toy import recipe, toy_train

    toy_train(recipe(folder, run={"steps": 2}), resume=True)


def one_of_checkpoint(rng: random.Random, folder: Path) -> None:
    files = [path for path in sorted((folder / "checkpoints").rglob("*")) if path.is_file()]
    path = rng.choice([path for path in files if path.name == "state.json"] if rng.random() < 0.4 else files)
    if path.name == "latest":
        path.write_bytes(rng.choice((mutations.of_bytes(rng, path.read_bytes()), *(p.encode() for p in PATHS))))
        return
    size = path.stat().st_size
    if path.name == "state.json" and rng.random() < 0.4:  # the sizes of the model, which nobody may believe
        state = json.loads(path.read_text())
        arguments = state["recipe"]["model"]["arguments"]
        state["recipe"]["model"]["arguments"] = mutations.of_value(rng, arguments)
        path.write_text(json.dumps(state))
        return
    path.write_bytes(by_name(path.name)(rng, path.read_bytes()))
    if path.name != "state.json" and rng.random() < 0.7:  # the sizes that the state tells are right
        state = path.parent / "state.json"
        state.write_text(state.read_text().replace(f": {size}", f": {path.stat().st_size}"))


# Recipes and lists


def make_recipe(folder: Path) -> None:
    from imgdit.recipes import packaged_recipes

    for name in ("scenes/transformer", "scenes/control_depth", "scenes/autoencoder"):
        (folder / f"{name.replace('/', '-')}.yaml").write_text(packaged_recipes()[name].read_text(encoding="utf-8"))


def load_recipes(folder: Path) -> None:
    from imgdit.training.recipe import load_recipe

    for path in sorted(folder.iterdir()):
        load_recipe(path)


def make_lines(folder: Path) -> None:
    Image.new("RGB", (16, 16), "red").save(folder / "edges.png")
    lines: list[dict[str, Any]] = [
        {"prompt": "a red cube", "seed": 3, "steps": 4, "guidance": 2.5, "width": 64, "height": 64},
        {"prompt": "a cone", "negative_prompt": "blur", "name": "cone-1", "num_images": 2},
        {"prompt": "a house", "control": {"canny": "edges.png"}},
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_lines(folder: Path) -> None:
    from imgdit.apps.jobs.plan import Plan
    from imgdit.apps.jobs.request import Request

    plan = Plan()
    plan.read(folder / "prompts.jsonl", Request())
    plan.at(folder / "out")


def one_list(rng: random.Random, folder: Path) -> None:
    path = next(folder.glob("*.jsonl"))
    if rng.random() < 0.1:
        return one_file(rng, folder)
    path.write_bytes(mutations.of_lines(rng, path.read_text()))


# Images and data of images


def image_files() -> dict[str, bytes]:
    """Every kind of encoded image that is read."""
    noise = Image.effect_noise((24, 20), 60)
    exif = Image.Exif()
    exif[0x0112] = 6
    palette = noise.quantize(8)
    wide = Image.frombytes("I;16", (8, 8), bytes(range(128)))
    big = Image.frombytes("I;16B", (8, 8), bytes(range(128)))
    unit = Image.new("F", (8, 8), 0.3)
    whole = Image.new("I", (8, 8), 40_000)
    made = {
        "plain.png": (noise.convert("RGB"), {}), "alpha.png": (noise.convert("RGBA"), {}), "wide.png": (wide, {}),
        "palette.png": (palette, {"transparency": 3}), "photo.jpg": (noise.convert("RGB"), {"exif": exif}),
        "cmyk.jpg": (noise.convert("CMYK"), {}), "web.webp": (noise.convert("RGBA"), {"exif": exif}),
        "still.gif": (palette, {}), "page.tif": (noise.convert("RGB"), {"compression": "tiff_lzw"}),
        "old.bmp": (noise.convert("RGB"), {}), "soft.png": (noise.convert("LA"), {}),
        "bits.png": (noise.convert("1"), {}), "key.png": (wide, {"transparency": 770}),
        "big.tif": (big, {}), "unit.tif": (unit, {}), "whole.tif": (whole, {}), "turned.tif": (noise, {"exif": exif}),
        "lab.tif": (noise.convert("RGB").convert("LAB"), {}),
    }  # fmt: skip
    files = {}
    for name, (image, options) in made.items():
        stream = io.BytesIO()
        form = {"jpg": "JPEG", "tif": "TIFF"}.get(name.rpartition(".")[2], name.rpartition(".")[2].upper())
        image.save(stream, form, **options)
        files[name] = stream.getvalue()
    stream = io.BytesIO()
    frames = [Image.effect_noise((12, 12), 90 + i) for i in range(3)]
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    return {**files, "moving.gif": stream.getvalue()}


def make_images(folder: Path) -> None:
    from imgdit.apps.jobs.png import Origin, write_png
    from imgdit.apps.jobs.request import Control, Request, RequestFrame

    for name, data in image_files().items():
        (folder / name).write_bytes(data)
    small = Image.new("RGB", (8, 8), "blue")
    asked = Request("a cube", controls=(Control("depth", small),), concepts=("neon",), features=((3, 0.5),))
    frames = Request(
        "", frames=(RequestFrame("image", small), RequestFrame("rays", camera=(1.0, 2.0)), RequestFrame())
    )
    for name, request in (("asked.png", asked), ("frames.png", frames)):
        write_png(
            small,
            folder / name,
            Origin(request, {"model": "x", "adapters": None, "sae": None}, "0", 0, {"imgdit": "1"}),
        )


def load_images(folder: Path) -> None:
    """As training data, and as what the command line and the page are given; all of them, the first error last. What
    is read has the whole range of 8 bits or of [0, 1], whatever it was."""
    from imgdit.apps.jobs.png import read_origin
    from imgdit.data.opening import decode_image
    from imgdit.images import open_image, to_pixels
    from imgdit.images.masks import mask_values

    def as_training_data(path: Path) -> None:
        assert decode_image(path.read_bytes()).image.mode == "RGB"

    def as_condition(path: Path) -> None:
        pixels = to_pixels(open_image(path))
        assert pixels.shape[1] == 3 and pixels.min() >= 0 and pixels.max() <= 1

    def as_mask(path: Path) -> None:
        assert mask_values(open_image(path)).dtype == torch.bool

    errors = []
    for path in sorted(folder.iterdir()):
        for read in (as_training_data, as_condition, as_mask, read_origin):
            try:
                read(path)
            except (ValueError, OSError) as error:
                errors.append(error)
    if errors:
        raise errors[0]


def one_image(rng: random.Random, folder: Path) -> None:
    """One image left and changed; in those that tell their origin mostly what they tell."""
    files = sorted(folder.iterdir())
    path = rng.choice(files)
    for other in files:
        if other != path:
            other.unlink()
    if path.name in ("asked.png", "frames.png") and rng.random() < 0.8:
        from PIL import PngImagePlugin

        image = Image.open(path)
        image.load()
        info = PngImagePlugin.PngInfo()
        info.add_text(
            "imgdit", mutations.of_json(rng, image.info["imgdit"]).decode(errors="replace").replace("\0", "\\u0000")
        )
        image.save(path, pnginfo=info)
        return
    change = mutations.of_image if rng.random() < 0.5 else mutations.of_bytes
    path.write_bytes(change(rng, path.read_bytes()))


def make_folder(folder: Path) -> None:
    (folder / "depth").mkdir()
    files = image_files()
    for name in ("plain.png", "photo.jpg"):
        (folder / name).write_bytes(files[name])
    for name in ("depth/plain.png", "more.png"):
        (folder / name).write_bytes(files["plain.png"])
    eye = [[1.0 * (i == j) for j in range(4)] for i in range(4)]
    lines: list[dict[str, Any]] = [
        {"file_name": "plain.png", "text": ["a cube", "a red cube"], "depth_file_name": "depth/plain.png"},
        {"file_name": "photo.jpg", "text": "a cone"},
        {"file_name": "more.png", "frames_file_names": ["plain.png"], "cameras": [eye, eye], "focal_length": 1.5},
    ]
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def load_folder(folder: Path) -> None:
    """What is wrong with a row is told of that row."""
    from imgdit.data import open_rows
    from imgdit.data.linter import check

    check(open_rows(folder), min_side=8, workers=1)


def one_metadata(rng: random.Random, folder: Path) -> None:
    one_list(rng, folder)
    if not (folder / "metadata.jsonl").is_file():  # without one, a folder is what the library `datasets` makes of it
        (folder / "metadata.jsonl").write_text("")


def make_captions(folder: Path) -> None:
    files = image_files()
    (folder / "3_more").mkdir()
    for name, data in {
        "a.png": files["plain.png"], "a.txt": b"a cube", "b.jpg": files["photo.jpg"], "b.caption": b"a cone\r\n",
        "3_more/c.png": files["plain.png"], "3_more/c.txt": "ein grüner Würfel".encode(), "d.png": files["alpha.png"],
    }.items():  # fmt: skip
        (folder / name).write_bytes(data)


STRAYS = (
    "._a.png",
    ".DS_Store",
    "Thumbs.db",
    "x.png.part",
    "sheet.png",
    "..png",
    "x.txt",
    "notes.pdf",
    "a.TXT",
    "A.PNG",
)
FOLDERS = ("__MACOSX", ".ipynb_checkpoints", "0_x", "3_", "-1_x", "99999999999_x", "train", "b.png", "a.txt", "x\\y")
ROWS = [{"file_name": "a.png", "text": "a; cube"}, {"file_name": "3_more\\c.png", "text": "x, y", "repeats": 2}]


def one_stray(rng: random.Random, folder: Path) -> None:
    """A caption in another encoding, a file or folder of other programs, metadata of any form, a link."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    for _ in range(rng.choice((1, 1, 2, 4))):
        what = rng.randrange(6)
        if what == 0:
            text = rng.choice([file for file in files if file.suffix in (".txt", ".caption")])
            text.write_bytes(mutations.of_encoding(rng, "a cube\n🙂"))
        elif what == 1:
            (path.parent / rng.choice(STRAYS)).write_bytes(rng.choice((b"", b"\0\5\x16\7", path.read_bytes())))
        elif what == 2:
            place = folder / rng.choice(FOLDERS)
            if not place.exists():
                place.mkdir()
                (place / path.name).write_bytes(path.read_bytes())
        elif what == 3:
            name = rng.choice(("metadata.jsonl", "metadata.json", "metadata.csv", "METADATA.CSV"))
            table = "".join(f'{row["file_name"]}{rng.choice(",;|")}"{row["text"]}"\n' for row in ROWS)
            forms = (json.dumps(ROWS), json.dumps(ROWS, indent=1), "\n".join(map(json.dumps, ROWS)))
            forms += (rng.choice(("file_name;text\n", "file_name,text\n", "file_name\ttext\n")) + table,)
            form, damaged = rng.choice(forms), rng.random() < 0.3
            data = mutations.of_bytes(rng, form.encode()) if damaged else mutations.of_encoding(rng, form)
            (folder / name).write_bytes(data)
        elif what == 4 and not (folder / "loop").is_symlink():
            (folder / "loop").symlink_to(rng.choice((folder, folder.parent, folder / "none")))
        else:
            path.write_bytes(mutations.of_bytes(rng, path.read_bytes()))


def make_shard(folder: Path) -> None:
    files = image_files()
    with tarfile.open(folder / "pictures.tar", "w") as tar:
        for name, data in {
            "a.png": files["plain.png"], "a.txt": b"a cube", "a.depth.png": files["plain.png"],
            "in/b.jpg": files["photo.jpg"], "in/b.json": b'{"text": ["x", "y"], "focal_length": 2}',
            "c.png": files["alpha.png"], "c.frames.0.png": files["plain.png"],
        }.items():  # fmt: skip
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def load_shard(folder: Path) -> None:
    from imgdit.data import open_rows
    from imgdit.data.convert import convert
    from imgdit.data.linter import check

    rows = open_rows(folder / "pictures.tar")
    report = check(rows, min_side=8, workers=1)
    if report.rows:
        convert(rows, folder / "out", shards=False, skip_broken=True)


def one_tar(rng: random.Random, folder: Path) -> None:
    """Damage, or a sound tar whose members have evil names, types, links or JSON."""
    path = folder / "pictures.tar"
    if rng.random() < 0.4:
        path.write_bytes(mutations.of_bytes(rng, path.read_bytes()))
        return
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    place = rng.randrange(len(members))
    with tarfile.open(
        path, "w", format=rng.choice((tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT))
    ) as tar:
        for number, (member, data) in enumerate(members):
            if number == place:
                what = rng.randrange(5)
                if what == 0:
                    member.name = rng.choice(
                        [*PATHS[:10], "../" * 9 + "x.png", "x.frames.99999.png", "x.y.z.png", ".png", "x."]
                    )
                elif what == 1:
                    member.type = rng.choice(
                        (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
                    )
                    member.linkname, data = rng.choice(PATHS[:6]), b""
                elif what == 2:
                    data = mutations.of_bytes(rng, data)
                elif member.name.endswith(".json"):
                    data = mutations.of_json(rng, data.decode())
                else:
                    member.name = rng.choice(
                        ("a.png", "in/b.png", "c.json", "d.txt", "e.tar", "f.bin", "g.pickle", "._a.png", "a.caption",
                         "__MACOSX/a.png", "in/.DS_Store", "a.jpg", "A.PNG", "c.png.part")
                    )  # fmt: skip
                    if member.name.endswith((".txt", ".caption")):
                        data = mutations.of_encoding(rng, "a cube")
            member.size = len(data)
            try:
                tar.addfile(member, io.BytesIO(data))
            except ValueError:  # USTAR has no room for such a name
                continue


LOADERS = {
    "lora": Loader(700, make_lora, load_lora, one_file),
    "adapters": Loader(300, make_adapters, load_adapters, one_adapter),
    "sae": Loader(600, make_sae, load_one_sae, one_file),
    "selection": Loader(500, make_selection, load_selection, one_selection),
    "checkpoint": Loader(700, make_run, load_run, one_of_checkpoint),
    "resume": Loader(150, make_run, resume_run, one_of_checkpoint),
    "recipe": Loader(800, make_recipe, load_recipes, one_file),
    "lines": Loader(600, make_lines, load_lines, one_list),
    "pictures": Loader(1200, make_images, load_images, one_image),
    "metadata": Loader(500, make_folder, load_folder, one_metadata),
    "captions": Loader(500, make_captions, load_folder, one_stray),
    "tar": Loader(500, make_shard, load_shard, one_tar),
}
