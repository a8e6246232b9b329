"""docs/api.md: the public names with their signatures and docstrings, read from the code."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import imgdit

SECTIONS = {
    "Pipelines": (
        "pipelines.text_to_image",
        "pipelines.one_diffusion",
        "pipelines.omni_control",
        "pipelines.masked_text",
        "pipelines.block_text",
        "pipelines.image_text",
        "pipelines.image_text_loading",
        "pipelines.mmada",
        "pipelines.text_loading",
        "pipelines.image_text",
        "pipelines.image_text_loading",
        "pipelines.vision_language",
        "pipelines.vision_language_loading",
        "pipelines.dialogues",
        "pipelines.few_steps",
        "live",
    ),
    "Free-form prompts": ("prompts",),
    "Frames and tasks": ("tasks", "frames", "layout", "cameras"),
    "Conditions and LoRA files": (
        "adapters.condition",
        "adapters.references",
        "adapters.options",
        "adapters.omni_control",
        "adapters.sharing",
        "lora.files",
    ),
    "Images": ("images", "images.preprocess", "images.tiles", "benchmarks.alignment"),
    "Models and sampling": (
        "models.mmdit",
        "models.nextdit",
        "attention.cache",
        "models.masked_lm",
        "models.image_tokens",
        "models.vision_language",
        "models.bd3lm",
        "models.magvitv2",
        "models.text_embeddings",
        "schedulers.flow_match",
        "schedulers.masked_text",
        "schedulers.mask_schedule",
        "schedulers.text_noise",
        "schedulers.schedule",
        "compat",
    ),
    "Model families": ("family", "families.step"),
    "Sparse autoencoders": (
        "sae.config",
        "sae.model",
        "sae.files",
        "sae.convert",
        "sae.hooks",
        "sae.unlearning",
        "sae.features",
        "sae.concepts",
    ),
    "μP": ("mup",),
    "Model cards and the Hub": ("cards", "hub", "pipelines.sharing"),
    "Training": (
        "training",
        "training.trained",
        "training.recipe",
        "training.sources",
        "training.batches",
        "training.objectives.flow_matching",
        "training.objectives.condition_lora",
        "training.objectives.few_steps",
        "training.masked_text_loss",
        "training.block_diffusion_loss",
        "training.block_likelihood",
        "training.objectives.masked_text",
        "training.objectives.block_text",
        "training.objectives.vision_language",
        "training.vision_language",
        "training.objectives.mmada",
        "training.mmada",
        "training.text_rows",
        "training.sae_recipe",
        "data.rows",
        "data.sources",
    ),
}
"""Modules of `imgdit` by heading: the names of their `__all__`, otherwise what they define."""
ONLY = {
    "compat": ("DiffusionPipeline", "ModelMixin", "SchedulerMixin"),
    "attention.cache": ("KVCache",),
    "benchmarks.alignment": ("Alignment", "alignment"),
    "images.preprocess": ("find_preprocessor", "preprocess"),
    "training.sources": ("Source",),
    "training.batches": ("Batch", "Text", "ObjectiveOutput"),
}
"""Of modules that are mostly for our own use, what others use."""
WIDTH = 110
"""Letters of a signature's line."""
_GROUPS = ("Args:", "Raises:", "Returns:", "Yields:")


def api_page() -> str:
    """The page as Markdown."""
    lines = [
        "# API",
        "",
        "Made from the docstrings by `imgdit docs api`; edit those.",
        "",
        "`from imgdit import …` knows these names, whatever module they are from: "
        + ", ".join(f"`{name}`" for name in imgdit.__all__)
        + ".",
        "",
    ]
    lines += [f"- [{title}](#{_anchor(title)})" for title in SECTIONS]
    for title, modules in SECTIONS.items():
        lines += ["", f"## {title}"]
        for name in modules:
            module = import_module(f"imgdit.{name}")
            lines += ["", f"### imgdit.{name}", "", *_prose((module.__doc__ or "").strip().split("\n\n")[0])]
            for value in _public(module, ONLY.get(name)):
                lines += ["", *_entry(value)]
    return "\n".join(lines) + "\n"


def public_names() -> dict[str, set[str]]:
    """Names of the page by the module that they are imported from."""
    found = {"imgdit": set(imgdit.__all__)}
    for name in (module for modules in SECTIONS.values() for module in modules):
        module = import_module(f"imgdit.{name}")
        found[module.__name__] = {value.__name__ for value in _public(module, ONLY.get(name))}
    return found


def _public(module: Any, only: tuple[str, ...] | None) -> Iterator[Any]:
    """Classes and functions for others, in the order of the source."""
    names = only or getattr(module, "__all__", None)
    if names is not None:
        yield from (getattr(module, name) for name in names)
        return
    for name, value in vars(module).items():
        own = getattr(value, "__module__", None) == module.__name__
        if own and not name.startswith("_") and (inspect.isclass(value) or inspect.isfunction(value)):
            yield value


def _entry(value: Any) -> list[str]:
    if inspect.isclass(value):
        return _class(value)
    return [f"#### {value.__name__}", "", *_code(_signature(value, value.__name__)), "", *_doc(value)]


def _class(value: type) -> list[str]:
    fields = _fields(value)
    written = "__init__" in vars(value) and not dataclasses.is_dataclass(value)
    call = _signature(vars(value)["__init__"], value.__name__, skip=1) if written else f"class {value.__name__}"
    lines = [f"#### {value.__name__}", "", *_code(call), "", *_doc(value)]
    if written and vars(value)["__init__"].__doc__:
        lines += ["", *_doc(vars(value)["__init__"])]
    if fields:
        lines += ["", "| field | type | default | |", "|---|---|---|---|"]
        lines += [f"| `{name}` | `{kind}` | {default} | {about} |" for name, kind, default, about in fields]
    for name, member in vars(value).items():
        function, skip = _function(member)
        if name.startswith("_") and name != "__call__":
            continue
        if function is None or function.__doc__ is None or not function.__module__.startswith("imgdit"):
            continue
        shown = name if isinstance(member, property) else _signature(function, f"{value.__name__}.{name}", skip)
        if isinstance(member, property):
            shown = f"{value.__name__}.{name}  # property"
        lines += ["", *_code(shown), "", *_doc(function)]
    return lines


def _function(member: Any) -> tuple[Callable[..., Any] | None, int]:
    """The function behind a member of a class, and how many of its first arguments nobody gives."""
    if isinstance(member, property):
        return member.fget, 1
    if isinstance(member, classmethod):
        return inspect.unwrap(member.__func__), 1
    if isinstance(member, staticmethod):
        return member.__func__, 0
    return (inspect.unwrap(member), 1) if inspect.isfunction(member) else (None, 0)


def _fields(value: type) -> list[tuple[str, str, str, str]]:
    """Name, type, default and the docstring below of each field of a dataclass or named tuple."""
    if not (dataclasses.is_dataclass(value) or hasattr(value, "_fields")):
        return []
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(value))).body
    assert isinstance(tree, ast.ClassDef)
    found = []
    for node, after in zip(tree.body, [*tree.body[1:], ast.Pass()]):
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id[0] != "_":
            docstring = after.value if isinstance(after, ast.Expr) else None
            about = docstring.value if isinstance(docstring, ast.Constant) else ""
            default = "" if node.value is None else f"`{_escaped(ast.unparse(node.value))}`"
            row = (node.target.id, _escaped(ast.unparse(node.annotation)), default)
            found.append((*row, _escaped(" ".join(str(about).split()))))
    return found


def _signature(function: Any, name: str, skip: int = 0) -> str:
    """`name(arguments) -> type` as the source has it."""
    (node,) = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function)))).body
    assert isinstance(node, ast.FunctionDef)
    arguments = list(_arguments(node.args))[skip:]
    returns = "" if node.returns is None or node.name == "__init__" else f" -> {ast.unparse(node.returns)}"
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= WIDTH:
        return line
    lines = [""]
    for argument in arguments:  # broken between arguments only
        if len(lines[-1]) + len(argument) > WIDTH - 4:
            lines.append("")
        lines[-1] += f"{argument}, "
    return "\n".join([f"{name}(", *(f"    {line.rstrip()}" for line in lines if line), f"){returns}"])


def _arguments(arguments: ast.arguments) -> Iterator[str]:
    """Each argument with its type and default, and the bare `*` before those that must be named."""
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + list(arguments.defaults)
    yield from map(_argument, positional, defaults)
    if arguments.vararg is not None:
        yield f"*{ast.unparse(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    yield from map(_argument, arguments.kwonlyargs, arguments.kw_defaults)
    if arguments.kwarg is not None:
        yield f"**{ast.unparse(arguments.kwarg)}"


def _argument(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return ast.unparse(argument)
    equals = " = " if argument.annotation is not None else "="
    return f"{ast.unparse(argument)}{equals}{ast.unparse(default)}"


def _doc(value: Any) -> list[str]:
    """A docstring as Markdown: prose, and a list for each group of arguments."""
    lines: list[str] = []
    prose: list[str] = []
    group: list[str] | None = None
    for line in [*inspect.cleandoc(value.__doc__ or "").splitlines(), "Args:"]:
        if line in _GROUPS:
            lines += _prose("\n".join(prose)) if group is None else _items(group)
            prose, group = [], []
            lines += ["", f"*{line.removesuffix(':')}*", ""]
        elif group is not None and (line.startswith("    ") or not line):
            group.append(line[4:])
        elif group is not None:  # prose after a group
            lines += _items(group)
            prose, group = [line], None
        else:
            prose.append(line)
    return "\n".join(lines[:-3]).strip().splitlines()


def _items(lines: list[str]) -> list[str]:
    """`name: text` with its continuation lines as a list; other text as one paragraph."""
    text = "\n".join(lines).strip("\n")
    items = [" ".join(item.split()).partition(": ") for item in re.split(r"\n(?!\s|$)", text)]
    if not all(colon and re.fullmatch(r"[\w, *]+", name) for name, colon, _ in items):
        return [" ".join(text.split())]
    return [f"- `{name}`: {about}" for name, _, about in items]


def _prose(text: str) -> list[str]:
    """Paragraphs; indented parts, which are code, in fences."""
    lines: list[str] = []
    for part in re.split(r"\n\s*\n", text.strip("\n")):
        code = part.startswith("    ")
        lines += [*_code(textwrap.dedent(part)), ""] if code else [part, ""]
    return lines[:-1] if lines else []


def _code(text: str) -> list[str]:
    return ["```python", *text.splitlines(), "```"]


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _anchor(title: str) -> str:
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
