"""The layout: one installed package `imgdit` whose rooms lie side by side in the repository."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from functools import cache
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from source_trees import syntax_tree

import imgdit

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
ROOMS = {folder: name for name, folder in PROJECT["tool"]["setuptools"]["package-dir"].items()}
PACKAGES = PROJECT["tool"]["setuptools"]["packages"]
SITE_PACKAGES = sysconfig.get_path("purelib")


def run(*arguments: str | Path, cwd: Path, path: tuple[str | Path, ...] = (SITE_PACKAGES,)) -> str:
    """Run this Python with dependencies but without an installed imgdit, and return what it printed.

    `-S` keeps the editable install out: its `.pth` file is only read by `site`. `path` is what stands on PYTHONPATH.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONDONTWRITEBYTECODE": "1"}
    # The tests below start pytest themselves; options and plugins meant for this run are not meant for theirs.
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_")}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    done = subprocess.run(
        [sys.executable, "-S", *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{' '.join(map(str, arguments))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def assert_only_imgdit(modules: list[str]) -> None:
    """No editable install helped, and no bare `pipelines` holds a second copy of the classes of `imgdit.pipelines`."""
    assert not [name for name in modules if name in ROOMS.keys() - {"imgdit"} or name.startswith("__editable__")]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is packaged, so that building leaves nothing in the checkout."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ROOMS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return source


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the folder."""
    return build(source, tmp_path_factory.mktemp("wheel"), "--wheel")


def build(source: Path, out: Path, *options: str) -> Path:
    """Build in this environment, and return the wheel."""
    command = [sys.executable, "-m", "build", "--no-isolation", *options, "--outdir", str(out), str(source)]
    done = subprocess.run(command, cwd=out, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_packages_are_the_folders_on_disk() -> None:
    found = {
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for folder, name in ROOMS.items()
        for init in (ROOT / folder).rglob("__init__.py")
    }
    assert sorted(PACKAGES) == sorted(found)


def test_every_folder_with_code_is_a_package() -> None:
    """A folder without `__init__.py` imports from a checkout and is missing from the wheel."""
    for folder in ROOMS:
        for module in (ROOT / folder).rglob("*.py"):
            assert (module.parent / "__init__.py").exists(), f"{module.parent} has no __init__.py"


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports(package: str) -> None:
    importlib.import_module(package)


@pytest.mark.parametrize("name", imgdit.__all__)
def test_exported_name_resolves(name: str) -> None:
    assert getattr(imgdit, name).__name__ == name
    assert name in dir(imgdit)


def test_static_exports_equal_the_lazy_ones() -> None:
    guards = [node for node in ast.parse(Path(imgdit.__file__).read_text()).body if isinstance(node, ast.If)]
    guard = next(node for node in guards if ast.unparse(node.test) == "TYPE_CHECKING")
    static = {node.names[0].name: node.module for node in guard.body if isinstance(node, ast.ImportFrom)}
    assert static == imgdit._EXPORTS
    assert imgdit.__all__ == sorted(static)


def test_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'MMDIT'.*'MMDiT'"):
        imgdit.MMDIT  # noqa: B018


def test_import_is_light_and_quick() -> None:
    program = (
        "import sys, time; start = time.process_time(); import imgdit; spent = time.process_time() - start\n"
        "heavy = [m for m in ('torch', 'diffusers', 'transformers', 'peft', 'numpy', 'PIL') if m in sys.modules]\n"
        "import json; print(json.dumps([spent, heavy]))"
    )
    spent, heavy = json.loads(run("-c", program, cwd=ROOT))
    assert heavy == []
    assert spent < 0.5  # about 10 ms on an idle machine


def test_wheel_holds_one_package(source: Path, wheel: Path) -> None:
    names = names_in(wheel)
    dist_info = f"imgdit-{imgdit.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"imgdit", dist_info}
    assert {"imgdit/py.typed", f"{dist_info}/licenses/LICENSE"} <= set(names)
    packaged = (".py", ".yaml", ".json", ".safetensors")
    expected = {
        "/".join([*name.split("."), *file.relative_to(source / folder).parts])
        for folder, name in ROOMS.items()
        for file in (source / folder).rglob("*")
        if file.suffix in packaged
    }
    assert {name for name in names if name.endswith(packaged) and not name.startswith(dist_info)} == expected


@pytest.mark.slow
def test_wheel_does_not_depend_on_the_way_it_was_built(source: Path, wheel: Path, tmp_path: Path) -> None:
    """From the folder, and by way of the source distribution."""
    assert sorted(names_in(wheel)) == sorted(names_in(build(source, tmp_path)))


@pytest.mark.slow
def test_wheel_makes_an_image_in_a_fresh_environment(wheel: Path, tmp_path: Path) -> None:
    """With this environment's dependencies, from a folder of nobody's, and with nothing of the checkout."""
    fresh, neutral = tmp_path / "fresh", tmp_path / "neutral"
    neutral.mkdir()
    venv.create(fresh, with_pip=False)
    python = fresh / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", "venv", {"base": str(fresh), "platbase": str(fresh)}))
    # Of a folder that a .pth file names, other .pth files (the editable install) are not read.
    (site / "dependencies.pth").write_text(SITE_PACKAGES)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def call(*command: str | Path) -> str:
        done = subprocess.run(
            list(map(str, command)), cwd=neutral, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    call(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index", wheel)
    call(fresh / "bin" / "imgdit", "generate", "a red cube", "--steps", "2", "--out", "red.png")
    with Image.open(neutral / "red.png") as image:
        assert image.size == (128, 128)
        assert json.loads(image.info["imgdit"])["places"]["model"].startswith(str(site))
    program = (
        "import imgdit, imgdit.pipelines, imgdit.apps, imgdit.configs, json, sys\n"
        "from importlib.resources import files\n"
        "from imgdit.checkpoints import SCENE_PROBE, SCENES\n"
        "found = [m.__file__ for m in (imgdit, imgdit.pipelines, imgdit.apps, imgdit.configs)]\n"
        "found += [str(files('imgdit') / 'py.typed'), str(files('imgdit.configs') / 'scenes/transformer.yaml')]\n"
        "found += [str(SCENES / 'transformer/config.json'), str(SCENE_PROBE / 'config.json')]\n"
        "print(json.dumps([found, list(imgdit.__path__), sys.path, sorted(sys.modules)]))"
    )
    files, package, path, modules = json.loads(call(python, "-c", program))
    assert all(Path(file).is_relative_to(site) and Path(file).is_file() for file in files)
    assert package == [str(site / "imgdit")] and str(ROOT) not in path
    assert_only_imgdit(modules)


def test_checkout_works_without_an_install() -> None:
    program = (
        "import imgdit.pipelines, imgdit.configs, json, sys\n"
        "print(json.dumps([[m.__file__ for m in (imgdit, imgdit.pipelines, imgdit.configs)], sorted(sys.modules)]))"
    )
    files, modules = json.loads(run("-c", program, cwd=ROOT))
    assert files == [str(ROOT / folder / "__init__.py") for folder in ("imgdit", "pipelines", "configs")]
    assert_only_imgdit(modules)


def test_command_line_runs_from_the_checkout() -> None:
    assert "generate" in run("-m", "imgdit.apps.cli", "--help", cwd=ROOT)


@pytest.mark.parametrize("mode", ["prepend", "append", "importlib"])
def test_pytest_import_modes(mode: str, tmp_path: Path) -> None:
    test = tmp_path / "test_trivial.py"
    test.write_text("import imgdit.pipelines\n\n\ndef test_it():\n    assert imgdit.pipelines.__path__\n")
    options = ["-q", "-p", "no:cacheprovider", f"--rootdir={ROOT}", "-c", ROOT / "pyproject.toml"]
    assert "1 passed" in run("-m", "pytest", *options, f"--import-mode={mode}", test, cwd=tmp_path)


def test_nobody_imports_a_room_by_its_bare_name() -> None:
    bare = set(ROOMS) - {"imgdit"}
    suspect = re.compile(rf"^\s*(?:from|import)\b.*(?<![.\w])(?:{'|'.join(bare)})\b", re.MULTILINE)
    assert suspect.search("\n    import json, apps.cli")
    for folder in [*ROOMS, "tests"]:
        for file in (ROOT / folder).rglob("*.py"):
            if not suspect.search(file.read_text()):
                continue  # most files, which need not be parsed
            for node in ast.walk(syntax_tree(file)):
                if isinstance(node, ast.Import):
                    imported = {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    imported = {str(node.module).split(".")[0]}
                else:
                    continue
                assert not imported & bare, f"{file}:{node.lineno} imports {imported & bare}, write imgdit.<name>"


def test_lock_satisfies_the_declared_ranges() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if not line.startswith("#")]
    locked = {}
    for requirement in map(Requirement, lines):
        assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), f"{requirement} is not an exact public version"
        locked[canonicalize_name(requirement.name)] = str(requirement.specifier)[2:]
    extras = PROJECT["project"]["optional-dependencies"]
    declared = PROJECT["project"]["dependencies"] + PROJECT["build-system"]["requires"]
    for requirement in map(Requirement, declared + extras["dev"]):
        version = locked[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"the lock has {requirement.name} {version}, not {requirement}"


TEXT_READERS = {"imgdit/io/text.py", "imgdit/io/lock.py", "imgdit/kernels.py", "apps/chores/api_page.py"}
"""Files that read what they or the system wrote, or split docstrings."""


def test_text_is_read_in_one_place_and_written_as_utf_8() -> None:
    """`Path.read_text` knows no byte-order mark, `str.splitlines` splits at U+2028, and systems' encodings differ."""
    for folder in ROOMS:
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(syntax_tree(file)):
                if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                    continue
                place, name = f"{file.relative_to(ROOT)}:{node.lineno}", node.func.attr
                if str(file.relative_to(ROOT)) not in TEXT_READERS:
                    assert name not in ("read_text", "splitlines"), f"{place} calls {name}; imgdit.io.text reads text"
                if name == "write_text":
                    assert any(key.arg == "encoding" for key in node.keywords), f"{place} writes without encoding"


LINES, PARAMETERS = 80, 12
"""That a function has at most; the docstring of a public one is not counted."""
MANY_PARAMETERS = {
    "pipelines/text_to_image.py ImgDiTPipeline.__call__": "diffusers' argument names",
    "pipelines/one_diffusion.py OneDiffusionPipeline.__call__": "diffusers' argument names",
    "pipelines/masked_text.py MaskedTextPipeline.__call__": "diffusers' argument names",
    "pipelines/block_text.py BlockTextPipeline.__call__": "diffusers' argument names",
    "pipelines/mmada.py MMaDAPipeline.__call__": "diffusers' argument names",
    "imgdit/schedulers/masked_text.py MaskedTextScheduler.__init__": "the configuration",
    "pipelines/vision_language.py VisionLanguagePipeline.__call__": "diffusers' argument names",
    "imgdit/schedulers/masked_text.py MaskedTextScheduler.step": "diffusers' argument names",
    "imgdit/models/mmdit.py MMDiT.__init__": "the configuration",
    "imgdit/models/mmdit.py MMDiT.forward": "diffusers' argument names",
    "imgdit/models/nextdit.py NextDiT.__init__": "the configuration",
    "imgdit/models/bd3lm.py BD3LM.__init__": "the configuration",
    "imgdit/models/image_tokens.py ImageProjector.__init__": "the configuration",
    "imgdit/training/objectives/flow_matching.py flow_matching": "the options of a recipe",
    "imgdit/training/objectives/masked_text.py masked_text": "the options of a recipe",
    "imgdit/scenes/training_texts.py SceneImageTexts.__init__": "the options of a recipe",
    "imgdit/training/block_diffusion_loss.py block_diffusion_loss": "the options of the published trainer",
    "apps/commands/bench.py unlearn": "the options of a command",
    "apps/commands/sae.py features": "the options of a command",
    "apps/demo/control.py _Handlers.control": "the fields of a page",
}


@cache
def functions() -> list[tuple[str, bool, ast.FunctionDef]]:
    """File and name of every function of the package, whether it is public, and its syntax tree."""
    found = []

    def visit(node: ast.AST, place: str, public: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                visit(child, place, public)
                continue
            name, is_open = f"{place}.{child.name}", public and (child.name[0] != "_" or child.name == "__call__")
            if not isinstance(child, ast.ClassDef):
                found.append((name.replace(".py.", ".py "), is_open, child))
            visit(child, name, is_open)

    for folder in ROOMS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            visit(syntax_tree(file), str(file.relative_to(ROOT)), True)
    return found


def test_functions_fit_on_a_screen() -> None:
    long = []
    for name, is_public, function in functions():
        docstring = function.body[0] if is_public and ast.get_docstring(function) else None
        counted = function.end_lineno - function.lineno + 1
        if docstring is not None:
            counted -= docstring.end_lineno - docstring.lineno + 1
        if counted > LINES:
            long.append(f"{name} has {counted} lines")
    assert not long


def test_parameter_lists_are_short() -> None:
    """Many options travel together in one object."""
    many = {}
    for name, _, function in functions():
        arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
        many[name] = len([one for one in arguments if one.arg not in ("self", "cls")])
    assert {name for name, count in many.items() if count > PARAMETERS} == MANY_PARAMETERS.keys()
