"""What `mkdocs build` adds to docs/: the pages of the repository's root and the reference of the public names.

The site is made of the files that readers of the repository see, so links keep the form that works there; where a page
moves, its links are rewritten here.
"""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
ROOT_PAGES = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
}
ROOT_FILES = tuple(
    f"examples/{name}" for name in ("first_contact.ipynb", "llamafactory_anneal.py", "swift_anneal.py")
)
"""Files that pages link to, and that are downloaded as they are."""
PACKAGES = ("formats", "cache_builder", "trainer")


def on_config(config: Any) -> Any:
    """Headings get the anchors they have in the repository's own view."""
    config.mdx_configs["toc"]["slugify"] = slug
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the root's pages and one page of public names for each package."""
    for source, target in ROOT_PAGES.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        files.append(File.generated(config, target, content=moved_links(text)))
    for source in ROOT_FILES:
        files.append(File.generated(config, source, abs_src_path=str(ROOT / source)))
    for package in PACKAGES:
        files.append(File.generated(config, f"api/{package}.md", content=reference(package)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Links to these files from pages in docs/."""
    return re.sub(r"\]\(\.\./(?=examples/)", "](", markdown)


def slug(heading: str, separator: str) -> str:
    """`Tail draws: why?` is `tail-draws-why`, and nothing is joined or cut."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", separator)


def moved_links(text: str) -> str:
    """Links of a page from the repository's root, as seen from docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    for source, target in ROOT_PAGES.items():
        text = re.sub(rf"\]\({re.escape(source)}(?=[)#])", f"]({target}", text)
    return text


def reference(package: str) -> str:
    """The page of a package: its docstring, then every public name where it is defined."""
    sys.path.insert(0, str(ROOT))
    face = importlib.import_module(package)  # loads nothing heavy; names are looked up on first use
    homes = {**getattr(face, "_HOME", {}), **getattr(face, "_MODULES", {})}
    assert sorted(homes) == face.__all__, f"{package} has public names that docs/site_hooks.py does not find"
    names = "\n\n".join(f"::: {package}.{homes[name]}.{name}" for name in face.__all__)
    return f"# {package}\n\n{(face.__doc__ or '').strip()}\n\n{names}\n"
