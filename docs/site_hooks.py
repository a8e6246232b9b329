"""What mkdocs does not do by itself: pages from the repository's root."""

import re
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Files of the root and the pages that they become."""
FILES = ("LICENSE", "CITATION.cff")
"""Files of the root that pages link to."""


def on_files(files, config):
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=in_docs(text)))
    for name in FILES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown, page, **others):
    for name, target in PAGES.items():
        markdown = markdown.replace(f"](../{name}", f"]({target}")
    return markdown


def in_docs(text):
    """A page of the root with its links as they are inside of docs/."""
    for name, page in PAGES.items():
        text = re.sub(rf"\]\({re.escape(name)}", f"]({page}", text)
    text = re.sub(r"\[([^]]*)\]\((?:imgdit|tests)/[^)]*\)", r"\1", text)  # sources are not part of the site
    return re.sub(r'(\]\(|src="|href=")docs/', r"\1", text)
