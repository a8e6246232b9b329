"""The two laws of the house and the direction of imports between its rooms, read from the sources."""

import ast
import re
from collections import defaultdict
from functools import cache
from importlib import import_module
from pathlib import Path

import diffusers
from diffusers import ModelMixin
from source_trees import syntax_tree

from imgdit.families import MODULES

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("imgdit", "pipelines", "adapters", "apps", "configs")

FLOORS = (
    ("moved", "naming", "defaults", "checkpoints", "cameras", "plotting", "quiet", "display"),
    ("io", "compat", "hub", "cards", "taught", "prompts"),
    ("recipes", "kernels", "tasks", "frames", "family"),
    ("layout",),
    ("attention", "lora", "mup", "schedulers"),
    ("models", "images", "sae"),
    ("families",),
    ("adapters",),
    ("pipelines", "live"),
    ("data",),
    ("training",),
    ("scenes",),
    ("benchmarks",),
    ("apps",),
)
"""Rooms from the ground up: a room imports from its own floor and from those below."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


@cache
def sources() -> dict[str, tuple[Path, ast.Module]]:
    """Every module of the package: its name, file and syntax tree."""
    found = {}
    for folder in FOLDERS:
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if folder == "imgdit" else ("imgdit", *parts)).removesuffix(".__init__")
            found[name] = (path, syntax_tree(path))
    return found


@cache
def imports() -> dict[str, set[str]]:
    """Module -> modules of the package that it imports, at the top or inside a function."""
    known = sources()
    found: dict[str, set[str]] = defaultdict(set)
    for name, (_, tree) in known.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module:
                targets = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                continue
            for target in targets:
                while target and target not in known:
                    target = target.rpartition(".")[0]
                if target and target != name:
                    found[name].add(target)
    return found


def room(module: str) -> str:
    return (module.split(".") + ["imgdit"])[1]


def test_every_room_has_a_floor():
    assert {room(name) for name in sources()} - {"imgdit", "configs"} <= FLOOR.keys()


def test_imports_go_down():
    """`imgdit/__init__.py` names what is public and is on no floor."""
    upward = [
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in targets
        if room(name) in FLOOR and room(target) in FLOOR and FLOOR[room(target)] > FLOOR[room(name)]
    ]
    assert not sorted(upward)


def test_the_library_knows_no_scene():
    """Nothing below scenes imports it; a recipe names what it takes from there by a dotted path."""
    allowed = {"scenes", "benchmarks", "apps"}
    assert not [
        f"{name} -> {target}"
        for name, targets in imports().items()
        for target in targets
        if room(target) == "scenes" and room(name) not in allowed
    ]


def test_no_circle_of_imports():
    graph, seen, done = imports(), [], set()

    def visit(name: str) -> None:
        assert name not in seen, " -> ".join([*seen[seen.index(name) :], name])
        if name in done:
            return
        seen.append(name)
        for target in sorted(graph[name]):
            if target != "imgdit":
                visit(target)
        done.add(seen.pop())

    for name in sorted(sources()):
        if name != "imgdit":
            visit(name)


def test_imports_are_absolute():
    relative = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path, tree in sources().values()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert not relative


def test_nothing_that_windows_lacks_is_needed_for_an_import():
    """At the top of a module; filelock itself does without."""
    lacks = {"fcntl", "grp", "pwd", "resource", "termios"}
    for path, tree in sources().values():
        for node in tree.body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert lacks.isdisjoint(names), f"{path.relative_to(ROOT)}:{node.lineno}"


NAMED_TUPLE = {"_replace", "_asdict", "_make", "_fields", "_field_defaults"}
"""Begin with an underscore so that no field can have their name; they are documented."""


def _defined(tree: ast.Module) -> set[str]:
    """Private names that a module defines or sets on its own objects."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store):
            names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return names


def test_private_names_of_other_libraries_stay_in_compat():
    """House rule 2. A private name is other people's where no module of ours defines it."""
    own = set().union(*(_defined(tree) for _, tree in sources().values()))
    found = []
    for name, (path, tree) in sources().items():
        if name == "imgdit.compat":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                names = [node.attr]
            elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("imgdit"):
                names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            else:
                continue
            for private in names:
                if private.startswith("_") and not private.endswith("__") and private not in own | NAMED_TUPLE:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno} {private}")
    assert not found, "\n".join(found)


NAMES_MODELS = {
    "imgdit.models.published_mup": "rewrites published weights for the class of diffusers that has their architecture",
    "imgdit.benchmarks.speed.families": "builds a model of each class of diffusers that takes conditions",
    "imgdit.benchmarks.speed.timing": "builds the models of diffusers that it compares with",
}
"""Modules outside of `imgdit/families` that name transformer classes, and why."""


def _denoisers() -> set[str]:
    """Names of diffusers' classes of transformers and U-Nets."""
    ending = re.compile(r".*(Transformer|Transformer\w*Model|DiT\w*|UNet\w*)")
    found = {name: getattr(diffusers, name) for name in dir(diffusers) if ending.fullmatch(name)}
    return {name for name, value in found.items() if isinstance(value, type) and issubclass(value, ModelMixin)}


def _named(tree: ast.Module) -> set[str]:
    """Words that a module's code and strings consist of, without docstrings."""
    prose = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and isinstance(node.body[0], ast.Expr)
    }
    words = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            words |= {alias.name for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            words |= set(re.findall(r"\w+", node.value))
    return words


def test_transformer_classes_are_named_in_their_families_alone():
    denoisers = _denoisers()
    assert {"FluxTransformer2DModel", "SD3Transformer2DModel", "UNet2DConditionModel"} <= denoisers
    naming = {name: _named(tree) & denoisers for name, (_, tree) in sources().items() if room(name) != "families"}
    assert {name: words for name, words in naming.items() if words and name not in NAMES_MODELS} == {}
    assert all(naming[name] for name in NAMES_MODELS)


def test_every_family_file_is_in_the_table():
    for name, module in MODULES.items():
        assert name in import_module(f"imgdit.families.{module}").FAMILY.classes
    files = {path.stem for path in (ROOT / "imgdit/families").glob("*.py")}
    shared = {"__init__", "names", "step", "streams"}
    assert {*MODULES.values()} == files - shared
