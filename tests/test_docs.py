"""README.md, CONTRIBUTING.md and docs/: every block runs, every command in the prose exists, every link resolves."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest
import tiny_krea2
import tiny_qwen_image
import tiny_z_image
import typer
import yaml
from block_text_cases import FIXTURES as BLOCK_DIFFUSION
from diffusers import Flux2KleinPipeline
from dual_diffusion_cases import PIPELINE as DUAL_DIFFUSION
from mmada_cases import FIXTURES as MMADA
from mmada_cases import image_tokenizer
from onediffusion_fixtures import TINY
from PIL import Image, ImageChops, ImageStat
from readme import command_line
from test_rooms import FLOORS
from tiny_control import flux, lora_file, with_texts
from tiny_flux2 import flux2
from tiny_images import write_folder
from tiny_text import make_model, make_tokenizer
from typer.testing import CliRunner
from vision_cases import FIXTURES as VISION_LANGUAGE

import imgdit
from imgdit.apps import comfyui
from imgdit.apps.chores.api_page import api_page, public_names
from imgdit.apps.cli import app
from imgdit.benchmarks.scenes import run as scene_bench
from imgdit.checkpoints import SCENES
from imgdit.lora.files import AdapterInfo
from imgdit.recipes import packaged_recipes, parse_as
from imgdit.sae.config import SAEConfig
from imgdit.sae.model import SparseAutoencoder, TimeConditionedAutoencoder
from imgdit.sae.unlearning import ConceptUnlearner
from imgdit.scenes.world import BACKGROUNDS, COLOURS, OBJECTS, STYLES
from imgdit.schedulers import schedule
from imgdit.schedulers.flow_match import linear_sigmas
from imgdit.training.recipe import parse_recipe
from imgdit.training.sae_recipe import SAERecipe

ROOT = Path(__file__).resolve().parent.parent
PAGES = {
    page.relative_to(ROOT).as_posix(): page.read_text()
    for page in [
        ROOT / "README.md",
        ROOT / "CONTRIBUTING.md",
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("docs/examples/*.md"),
    ]
}
HISTORY = {page.relative_to(ROOT).as_posix(): page.read_text() for page in ROOT.glob("docs/history/*.md")}
"""Old entries of the log, whose commands and names are those of their day."""
LINKED = PAGES | HISTORY
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
NAMED = re.compile(r"# (\w+\.(?:py|yaml))\n")
"""How a block begins that is a file: it is written, and modules are imported by the blocks and commands after it."""

SMALLER = {
    r"num_inference_steps=\d+": "num_inference_steps=2",
    r"\b(height|width)=512": r"\1=16",
    r'\.to\("cuda"\)': '.to("cpu")',
}
"""What is changed in Python blocks, so that they take seconds and need no GPU."""
OPTIONS = {
    "generate": ["--steps", "2"],
    "control": ["--steps", "2"],
    "any": ["--steps", "2"],
    "unlearn": ["--steps", "2"],
    "sae features": ["--steps", "2", "--count", "1"],
}
"""What is added to commands, for the same."""
NOT_RUN = {
    "imgdit train scenes/": "hours; tests/apps/test_scenes.py runs these recipes with small models",
    "imgdit train own/condition_lora --check": "a minute; tests/training/test_overfit.py",
    "imgdit train own/condition_lora --set run.steps=2000": "a plan, ten seconds; tests/training/test_memory.py",
    "imgdit train own/condition_lora --plan": "the same",
    "imgdit sae train": "an hour; tests/sae/test_run.py trains small ones",
    "imgdit assemble": "needs those runs; tests/apps/test_scenes.py",
    "imgdit caption": "the model is on the Hub; tests/apps/test_caption_commands.py",
    "imgdit answer": "the same",
    "imgdit data caption": "the same",
    "imgdit demo": "ends with Ctrl-C; tests/apps/test_demo.py serves it",
    "imgdit bench scenes": "minutes; tests/apps/test_scenes.py",
    "imgdit bench control": "the same",
    "imgdit bench text": "the same; tests/benchmarks/test_image_text.py",
    "imgdit bench unlearn": "minutes to hours; tests/apps/test_unlearn.py",
    "imgdit bench training": "hours; tests/benchmarks/test_ablation.py",
    "imgdit bench sae-steering": "the same; tests/benchmarks/test_steering.py",
    "imgdit mup coord-check scale/": "a model of 188 M parameters; tests/mup/test_coordinates.py",
    "imgdit mup transfer": "hours; tests/mup/test_transfer.py",
    "accelerate launch": "several processes; tests/training/test_more_machines.py",
    "make ": "installs and checks everything; the targets must exist",
}
"""Beginnings of commands that are parsed but not run, and why."""
ENTRY_POINTS = {"imgdit.objectives", "imgdit.data", "imgdit.models", "imgdit.preprocessors"}
"""Groups that packages declare names in, see `imgdit.recipes.find_object`."""
LISTINGS = {"text": "a listing of files", "": "nothing: every block names its language"}
"""Languages of blocks that are no program."""
UNTOUCHED = {"docs/api.md": "signatures, compared as a whole below"}
"""Pages whose blocks are not programs."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """What the pages load from the Hub, as tiny folders."""
    folder = tmp_path_factory.mktemp("hub")
    pipe = with_texts(flux())
    pipe.save_pretrained(folder / "flux")
    for name in ("experimental/canny", "omini/subject_512", "my_edges"):
        lora_file(folder / f"omini/{name}.safetensors", pipe.transformer)
    place, width = "transformer.transformer_blocks.0.ff", pipe.transformer.inner_dim
    sizes = SAEConfig(width, 32, 32, transcode=True, time_embed_dim=8, hookpoint=place, threshold=0.0)
    TimeConditionedAutoencoder(sizes).save_pretrained(folder / "difffract-transcoders" / place)
    klein = with_texts(flux2(Flux2KleinPipeline))
    klein.save_pretrained(folder / "klein")
    targets = r".*attn\.(to_[qkv]|to_qkv_mlp_proj)"
    lora_file(folder / "refcontrol/depth.safetensors", klein.transformer, targets)
    make_model(max_position_embeddings=512).save_pretrained(folder / "llada")
    make_tokenizer(template=True).save_pretrained(folder / "llada")
    gpt2 = make_tokenizer()
    gpt2.bos_token = gpt2.eos_token
    gpt2.save_pretrained(folder / "gpt2")
    image_tokenizer().save_pretrained(folder / "magvitv2")
    return {
        "GSAI-ML/LLaDA-8B-Instruct": folder / "llada",
        "jacklishufan/lavida-llada-v1.0-instruct": VISION_LANGUAGE / "lavida/model",
        "GSAI-ML/LLaDA-V": VISION_LANGUAGE / "llada_v/model",
        "Gen-Verse/MMaDA-8B-MixCoT": MMADA / "lm",
        "showlab/magvitv2": folder / "magvitv2",
        "openai-community/gpt2": folder / "gpt2",
        "kuleshov-group/bd3lm-owt-block_size16": BLOCK_DIFFUSION / "bd3lm",
        "black-forest-labs/FLUX.1-dev": folder / "flux",
        "black-forest-labs/FLUX.1-schnell": folder / "flux",
        "difffract-transcoders": folder / "difffract-transcoders",
        "black-forest-labs/FLUX.2-klein-4B": folder / "klein",
        "Yuanshi/OminiControl": folder / "omini",
        **_of_families(folder),
        "refcontrol.safetensors": folder / "refcontrol/depth.safetensors",
        "lehduong/OneDiffusion": TINY,
        "JleeOfficial/dual_diff_sd3_512_base": DUAL_DIFFUSION,
    }


def _of_families(folder):
    """Tiny pipelines of other families, with an adapter each."""
    found = {}
    for tiny, name, adapter in (
        (tiny_z_image, "Tongyi-MAI/Z-Image-Turbo", "z-image-canny"),
        (tiny_krea2, "krea/Krea-2-Turbo", "krea-2-depth"),
        (tiny_qwen_image, "Qwen/Qwen-Image", "qwen-image-canny"),
    ):
        found[name] = tiny.folder(folder / adapter)
        case = next(iter(tiny.CASES.values()))
        file = folder / f"{adapter}.safetensors"
        found[f"your-name/{adapter}"] = lora_file(file, case.pipeline().transformer, case.targets)
    return {**found, "Tongyi-MAI/Z-Image": found["Tongyi-MAI/Z-Image-Turbo"]}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter and a sparse autoencoder of the embedded model that know nothing."""
    folder = tmp_path_factory.mktemp("trained")
    pipe = imgdit.DiffusionPipeline.from_pretrained(SCENES)
    info = AdapterInfo(task="depth", mode="independent")
    lora_file(folder / "depth.safetensors", pipe.transformer, r".*attn\.to_[qkv]", info=info)
    for run, place in (("sae", "transformer.transformer_blocks.0"), ("sae_text", "transformer.context_embedder")):
        unlearner = ConceptUnlearner({place: SparseAutoencoder(SAEConfig(256, 32, 4, hookpoint=place))})
        unlearner.learn(pipe, {"neon": ["a neon cube"], "photo": ["a photo"]}, top_n=2, num_inference_steps=1)
        unlearner.save_pretrained(folder / run / "saes")
    return folder


@pytest.fixture
def desk(tmp_path, trained, hub, monkeypatch):
    """A folder with the files that the pages speak of."""
    for name in ("edges", "map", "item"):
        Image.effect_noise((128, 128), 80).convert("RGB").save(tmp_path / f"{name}.png")
    write_folder(tmp_path / "training_images", 8, size=(128, 128), conditions=True)
    lines = tmp_path / "training_images/metadata.jsonl"
    lines.write_text(lines.read_text().replace("grey_file_name", "canny_file_name"))  # as pip without extras has it
    shutil.copy(trained / "depth.safetensors", tmp_path)
    for run in ("sae", "sae_text"):
        shutil.copytree(trained / run, tmp_path / "outputs/scenes" / run)
    (tmp_path / "outputs/own").mkdir()
    shutil.copy(hub["Yuanshi/OminiControl"] / "my_edges.safetensors", tmp_path / "outputs/own")
    (tmp_path / "prompts.txt").write_text("a red cube, neon style\na blue cone, photo style\n")
    (tmp_path / "prompts.jsonl").write_text('a red cube\n{"prompt": "a cone", "control": {"canny": "edges.png"}}\n')
    pair = {"query": "a red cube at night", "positive": "at night, a red cube", "negative": "a blue cube at night"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(pair)}\n" * 20)
    monkeypatch.setattr(schedule, "linear_sigmas", lambda steps: linear_sigmas(min(steps, 2)))  # where none are named
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", sorted(PAGES.keys() - UNTOUCHED.keys()))
def test_blocks_run(page, desk, hub):
    names = {"__name__": page}
    for language, code in BLOCK.findall(PAGES[page]):
        if named := NAMED.match(code):
            Path(named[1]).write_text(_small_recipe(code, hub) if language == "yaml" else code)
        if language == "python" and not named:
            exec(compile(_small(code, hub), f"{page}: {code[:40]!r}", "exec"), names)
        elif language == "sh":
            for number, line in enumerate(code.replace("\\\n", " ").splitlines(), start=1):
                if words := shlex.split(line.removeprefix("PYTHONPATH=. "), comments=True):
                    _command(words, number, runs=code != command_line())
        elif language == "yaml":
            values = yaml.safe_load(code)
            recipe = parse_as(SAERecipe, values, page) if "sae" in values else parse_recipe(values, page)
            assert recipe.run.steps
        elif language == "toml":
            groups = tomllib.loads(code)["project"]["entry-points"]
            assert groups.keys() <= ENTRY_POINTS
            for place in [place for group in groups.values() for place in group.values()]:
                module, _, attribute = place.partition(":")
                assert callable(getattr(import_module(module), attribute))
        elif language == "json":
            assert all(isinstance(json.loads(line), dict) for line in code.splitlines())
        elif not named:
            assert LISTINGS[language].startswith("a listing"), f"{page} has a block of no language:\n{code}"


def _small(code, hub):
    for name, folder in hub.items():
        code = code.replace(f'"{name}"', repr(str(folder)))
    for pattern, instead in SMALLER.items():
        code = re.sub(pattern, instead, code)
    return code


def _small_recipe(code, hub):
    for name, folder in hub.items():
        code = re.sub(rf": {re.escape(name)}$", f": {folder}", code, flags=re.M)
    return code.replace("base: 512", "base: 16")


def _command(words, number, runs):
    """Parse a command against the real one, and run it if it `runs`, unless `NOT_RUN` says why not."""
    reason = next((why for start, why in NOT_RUN.items() if " ".join(words).startswith(start)), None)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:.*##", (ROOT / "Makefile").read_text(), re.M), words
        return
    if words[0] == "accelerate":
        assert (ROOT / words[words.index("--config_file") + 1]).is_file(), words
        words = ["imgdit", *words[words.index("imgdit.apps.cli") + 1 :]]
    assert words[0] == "imgdit", f"who runs {words[0]}?"
    path, command, rest = _resolved(words[1:])
    command.make_context(path, list(rest))  # refuses unknown options, missing arguments and values of another type
    if runs and reason is None:
        more = ["--stop-at", str(number)] if path == "train" else OPTIONS.get(path, [])
        if "--turbo" in words:  # whose number of steps is its own
            more = [one for one in more if one not in ("--steps", "2")]
        done = CliRunner().invoke(app, [*words[1:], *more])
        assert done.exit_code == 0, f"{shlex.join(words)}\n{done.output}{done.exception!r}"


@cache
def whole_command():
    return typer.main.get_command(app)


def _resolved(words):
    """The command that words name, its name, and the words after it."""
    command, rest, path = whole_command(), list(words), []
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        assert rest[0] in command.commands, f"there is no command imgdit {' '.join([*path, rest[0]])}"
        path.append(rest.pop(0))
        command = command.commands[path[-1]]
    return " ".join(path), command, rest


@pytest.mark.parametrize("page", sorted(PAGES.keys() - UNTOUCHED.keys()))
def test_commands_in_sentences_exist(page):
    for said in re.findall(r"`(imgdit [^`]*)`", BLOCK.sub("", PAGES[page])):
        _, command, rest = _resolved([word for word in said.split()[1:] if word != "…"])
        known = {"--help", *(option for one in command.params for option in [*one.opts, *one.secondary_opts])}
        assert {word.partition("=")[0] for word in rest if word.startswith("--")} <= known, said


@pytest.mark.parametrize("page", sorted(LINKED))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", LINKED[page]):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", file.read_text()), re.M)
            anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert anchor in anchors, f"{page} links to {target}, which has {anchors}"


def test_pages_import_public_names_only():
    """What a block imports stands on the API page, or is the path of the embedded model or ComfyUI's tables."""
    known = public_names() | {"imgdit.checkpoints": {"SCENES"}, "imgdit.apps.comfyui": set(comfyui.__all__)}
    taught = set()
    pages = [PAGES[page] for page in PAGES.keys() - UNTOUCHED.keys()]
    for code in (code for text in pages for language, code in BLOCK.findall(text) if language == "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "imgdit":
                taught |= {(node.module, alias.name) for alias in node.names}
    assert len(taught) > 30
    assert not sorted((module, name) for module, name in taught if name not in known.get(module, ()))


@pytest.mark.parametrize("page", sorted(PAGES.keys() - UNTOUCHED.keys()))
@pytest.mark.filterwarnings("error::DeprecationWarning")
def test_names_in_the_prose_exist(page):
    """Dotted names of modules, classes and functions; none of them is an old one."""
    for name in set(re.findall(r"`(imgdit(?:\.\w+)+)[`(]", BLOCK.sub("", PAGES[page]))) - ENTRY_POINTS:
        module, rest = name, []
        while find_module(module) is None:
            module, _, attribute = module.rpartition(".")
            rest.append(attribute)
        found = import_module(module)
        for attribute in reversed(rest):
            found = getattr(found, attribute)


def find_module(name):
    try:
        return find_spec(name)
    except ModuleNotFoundError:
        return None


def test_messages_of_the_troubleshooting_page_are_in_the_code():
    """The first column quotes constant parts of messages."""
    said = [
        part.value
        for folder in ("imgdit", "adapters", "pipelines", "apps")
        for file in (ROOT / folder).rglob("*.py")
        for part in ast.walk(ast.parse(file.read_text()))
        if isinstance(part, ast.Constant) and isinstance(part.value, str)
    ]
    quoted = re.findall(r"^\| `([^`]+)`", PAGES["docs/troubleshooting.md"], re.M)
    assert len(quoted) > 25
    assert not [
        message for message in quoted if not message.startswith("--") and not any(message in one for one in said)
    ]


def test_every_room_of_the_readme_is_there():
    (tree,) = (code for language, code in BLOCK.findall(PAGES["README.md"]) if language == "text")
    rooms = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / room).is_dir() for room in rooms)
    inits = [*ROOT.glob("*/__init__.py"), *ROOT.glob("imgdit/*/__init__.py")]
    packages = {f"{init.parent.relative_to(ROOT).as_posix()}/" for init in inits}
    assert packages | {"tests/", "docs/"} == set(rooms)


def test_packages_of_contributing_are_the_floors_of_the_imports():
    table = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", PAGES["CONTRIBUTING.md"], re.M)
    assert [tuple(re.findall(r"`(\w+)`", row)) for row in table] == [tuple(rooms) for rooms in FLOORS]


def test_the_site_builds_without_a_broken_link(tmp_path):
    """Opened from a disk: no page asks for fonts or is a folder."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {page.relative_to(tmp_path / "site").as_posix() for page in tmp_path.glob("site/**/*.html")}
    names = {page.removeprefix("docs/").replace("README", "index").removesuffix(".md").lower() for page in PAGES}
    assert names <= {page.removesuffix(".html") for page in pages}
    start = (tmp_path / "site/index.html").read_text()
    assert "fonts.g" not in start and 'href="control.html#references-as-conditions"' in start


def test_every_page_is_in_the_readme():
    linked = set(re.findall(r"\]\((docs/[\w/-]+\.md)\)", PAGES["README.md"]))
    assert linked == PAGES.keys() - {"README.md", "CONTRIBUTING.md"}


def test_the_card_names_what_the_embedded_model_knows():
    known = {"objects": OBJECTS, "colours": COLOURS, "styles": STYLES, "backgrounds": BACKGROUNDS}
    rows = dict(re.findall(r"^\| (\w+) \| ([\w, ]+) \|$", PAGES["docs/embedded-model.md"], re.M))
    assert {kind: rows[kind].split(", ") for kind in known} == {kind: list(words) for kind, words in known.items()}


def test_numbers_of_the_log_are_in_its_history():
    """The log repeats the newest numbers of dated entries: no number stands in it alone."""
    number = re.compile(r"\d+(?:[.,]\d+)*")
    entries = set(number.findall("\n".join(HISTORY.values())))
    text = re.sub(r"\]\([^)]*\)", "]", PAGES["docs/log.md"])
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) > 100
    assert not [row for row in rows if not set(number.findall(row)) <= entries]


def test_no_command_writes_where_recipes_read_images():
    """What `imgdit generate` made must never be taken for data by a recipe that is run after it."""
    recipes = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in packaged_recipes().values()]
    arguments = [recipe.get("data", {}).get("arguments", {}) for recipe in recipes if isinstance(recipe, dict)]
    read = {values["path"] for values in arguments if "path" in values}
    assert read == {"training_images", "texts.jsonl", "pairs.jsonl", "dialogues.json", "tasks.jsonl"}
    written = {word for text in PAGES.values() for word in re.findall(r"--(?:out|folder)[ =](\S+)", text)}
    commands = [whole_command()]
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        written |= {str(option.default) for option in command.params}
    assert len(commands) > 30
    assert not [place for place in written if Path(place).parts[:1] == ("training_images",)]


def test_the_api_page_is_up_to_date():
    page = api_page()
    if PAGES["docs/api.md"] != page:  # a diff of it would be thousands of lines
        pytest.fail("docs/api.md is not what the docstrings say; run: imgdit docs api")
    assert all(f"`{name}`" in page and f"#### {name}\n" in page for name in imgdit.__all__)


def test_versions_agree():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == imgdit.__version__
    assert f"## [{imgdit.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
    papers = {reference["identifiers"][0]["value"].removeprefix("arXiv:") for reference in citation["references"]}
    assert papers == set(re.findall(r"\[(\d{4}\.\d{5})\]", PAGES["README.md"]))


def test_the_diagram_is_drawn_by_a_command(tmp_path):
    """Twice the same bytes, and the committed file but for the rendering of other versions of matplotlib."""
    files = [tmp_path / "one.png", tmp_path / "folder/two.png"]
    for file in files:
        assert CliRunner().invoke(app, ["docs", "architecture", str(file)]).exit_code == 0
    assert files[0].read_bytes() == files[1].read_bytes()
    drawn, committed = (Image.open(f).convert("L") for f in (files[0], ROOT / "docs/images/architecture.png"))
    assert drawn.size == committed.size
    assert ImageStat.Stat(ImageChops.difference(drawn, committed)).mean[0] < 1


@pytest.mark.slow
def test_the_images_are_made_by_one_command(trained, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(SCENES, model, symlinks=True, ignore=shutil.ignore_patterns("adapters", "sae"))
    (model / "adapters").mkdir()
    shutil.copy(trained / "depth.safetensors", model / "adapters")
    for run in ("sae", "sae_text"):
        shutil.copytree(trained / run / "saes", model / "sae", dirs_exist_ok=True)
    monkeypatch.setattr(scene_bench, "seconds", lambda *_: {})  # starts processes
    done = CliRunner().invoke(
        app, ["docs", "images", str(tmp_path / "docs"), "--model", str(model), "--count", "2", "--steps", "1"]
    )
    assert done.exit_code == 0, done.output + repr(done.exception)
    made = {file.name for file in (tmp_path / "docs/images").iterdir()}
    assert {"generate.png", "any.png", "views.png", "control.png", "unlearn.png", "text-one-object.jpg"} <= made
    shown = {name for text in PAGES.values() for name in re.findall(r"\((?:docs/)?images/([\w.-]+)\)", text)}
    # One image of each kind may show no mistake; has its own command; windows of a browser.
    apart = {"failures.jpg", "architecture.png", "demo.jpg", "demo-ask.jpg"}
    assert shown - apart <= made
    numbers = json.loads((tmp_path / "docs/bench-scenes.json").read_text())
    assert numbers["model"] == "model" and not (tmp_path / "docs/bench").exists()
