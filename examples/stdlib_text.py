"""Text that every Python installation carries, as two disjoint domains with fixed splits.

``prose`` is the language reference behind ``help()`` (``pydoc_data.topics``) and the docstrings of
the standard library; ``code`` is the standard library's source with the docstrings cut out. Nothing
is committed to the repository: the text is read from the running interpreter.

A module goes to the same side of the split for both domains, through a hash of its *top-level* name,
so the split does not depend on the Python version, and a module that becomes a package (``pathlib``)
or grows a private twin (``_pydatetime``) stays where it was:

    source-train     prose of training modules and topics (what the base model was trained on)
    source-heldout   prose of held-out modules and topics
    target-train     code of training modules (never shown to the base model)
    target-heldout   code of held-out modules (never shown to anything)
    base-train       what ``make_tiny_base.py`` reads: ``source-train`` and the docstrings and READMEs of
                     installed packages (prose); source files of those packages (code)

Training prose drops every paragraph that also occurs in the held-out prose (topics quote each other).
Modules are parsed, never imported. Cost: about 3 s for the standard library, 1-2 minutes for ``base-train``.

    python examples/stdlib_text.py --domain code --split target-train --out code.jsonl --max-bytes 2000000
"""

import argparse
import ast
import email
import hashlib
import importlib.metadata
import json
import os
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

SPLITS = {
    "prose": ("source-train", "source-heldout", "base-train"),
    "code": ("target-train", "target-heldout", "base-train"),
}
HELDOUT_PERCENT = 15
MIN_DOCSTRING_CHARS = 20
MIN_PARAGRAPH_CHARS = 40  # shorter paragraphs ("Example:") are not evidence of a copy

# Not in every installation (Debian packages them apart), or not text: character maps, bundled wheels.
SKIPPED_TOP_LEVEL = frozenset(
    {"test", "site-packages", "dist-packages", "encodings", "pydoc_data", "ensurepip"}
)
SKIPPED_DIRECTORIES = frozenset({"test", "tests", "idle_test", "testing", "__pycache__", "_vendor"})

# Packages read for `base-train` only. None of them carries a copy of standard-library modules
# (setuptools, pip, multiprocess and typing_extensions do, and are left out for that reason).
BASE_PACKAGES = (
    "torch", "transformers", "numpy", "pandas", "pyarrow", "datasets", "sympy", "networkx", "mpmath",
    "matplotlib", "vllm", "huggingface_hub", "peft", "accelerate", "pydantic", "fsspec", "hypothesis",
    "_pytest", "numba", "PIL", "fontTools", "mypy", "pygments", "rich", "click", "typer", "jinja2",
    "aiohttp", "requests", "urllib3", "httpx", "fastapi", "starlette", "openai", "websockets", "triton",
    "werkzeug", "tensorboard", "dns", "attr", "psutil", "yaml", "cffi", "dateutil", "absl", "anyio",
    "tqdm", "safetensors", "tokenizers", "mistral_common", "llvmlite",
)  # fmt: skip
MAX_PACKAGE_BYTES = {"prose": 2_500_000, "code": 100_000}
MAX_README_BYTES = 60_000

Definition = ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, kw_only=True)
class Document:
    """One text of one domain; `name` is stable across machines and Python versions."""

    name: str
    text: str


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def split_key(module: str) -> str:
    """The name that decides the split: top level, without the underscores and `_py` of private twins."""
    top = module.split(".")[0]
    bare = top.removeprefix("_py") if top.startswith("_py") else top.strip("_")
    return bare or top


def is_heldout(key: str) -> bool:
    """Whether the module or topic of this key is held out; the same on every machine."""
    return _hash("anneal " + key) % 100 < HELDOUT_PERCENT


def _python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module name, path) of the Python files under a package or the standard library, sorted."""
    for folder, subfolders, files in os.walk(root):
        parts = Path(folder).relative_to(root).parts
        subfolders[:] = sorted(
            name
            for name in subfolders
            if name.isidentifier()
            and name not in SKIPPED_DIRECTORIES
            and (parts or name not in SKIPPED_TOP_LEVEL)
        )
        for file in sorted(files):
            stem = file.removesuffix(".py")
            if file.endswith(".py") and stem.isidentifier() and not stem.startswith("_sysconfigdata"):
                yield ".".join((*parts, *(() if stem == "__init__" else (stem,)))), Path(folder, file)


def _parse(path: Path) -> tuple[str, ast.Module] | None:
    """Source and syntax tree, or None for a file that is not valid UTF-8 Python (there are a few)."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return source, ast.parse(source)
    except (UnicodeDecodeError, SyntaxError, ValueError, RecursionError):
        return None


def _documented(tree: ast.Module) -> Iterator[tuple[str, ast.Module | Definition]]:
    """(qualified name, node) of everything that can carry a docstring, in source order."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, Definition]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, Definition):
                yield f"{prefix}{child.name}", child
                yield from walk(child, f"{prefix}{child.name}.")
            else:
                yield from walk(child, prefix)

    yield "", tree
    yield from walk(tree, "")


def docstrings(module: str, tree: ast.Module) -> list[tuple[str, str]]:
    """(qualified name, cleaned docstring) of a module, in source order."""
    found = []
    for name, node in _documented(tree):
        text = (ast.get_docstring(node) or "").strip()
        if len(text) >= MIN_DOCSTRING_CHARS:
            found.append((f"{module}.{name}" if name else module, text))
    return found


def without_docstrings(source: str, tree: ast.Module) -> str:
    """The source without its docstring lines; comments stay, a body of only a docstring becomes empty."""
    lines = source.splitlines()
    for _, node in _documented(tree):
        if ast.get_docstring(node, clean=False) is None:
            continue
        first = node.body[0]
        for number in range(first.lineno - 1, first.end_lineno or first.lineno):
            lines[number] = "\0"
    return "\n".join(line for line in lines if line != "\0").strip() + "\n"


def _paragraph_key(paragraph: str) -> str:
    return " ".join(paragraph.split())


def _drop_paragraphs(text: str, unwanted: set[str], *, remember: bool = False) -> str:
    """Text without its longer paragraphs that are in `unwanted`; `remember` adds the rest to it."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = _paragraph_key(paragraph)
        if len(key) >= MIN_PARAGRAPH_CHARS:
            if key in unwanted:
                continue
            if remember:
                unwanted.add(key)
        kept.append(paragraph)
    return "\n\n".join(kept).strip()


def _prose_of_module(module: str, tree: ast.Module, unwanted: set[str], *, remember: bool = False) -> str:
    entries = []
    for name, text in docstrings(module, tree):
        text = _drop_paragraphs(text, unwanted, remember=remember)
        if len(text) >= MIN_DOCSTRING_CHARS:
            entries.append(f"{name}\n\n{text}\n")
    return "\n".join(entries)


def _topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some minimal installations leave the help texts out
        return {}
    return dict(topics)


def _stdlib_trees(*, heldout: bool) -> Iterator[tuple[str, str, ast.Module]]:
    """(module, source, tree) of one side of the split."""
    for module, path in _python_files(Path(sysconfig.get_paths()["stdlib"])):
        if is_heldout(split_key(module)) == heldout and (parsed := _parse(path)) is not None:
            yield module, *parsed


def _stdlib_prose(*, heldout: bool, unwanted: set[str]) -> Iterator[Document]:
    for topic, text in sorted(_topics().items()):
        if is_heldout("topic " + topic) == heldout:
            yield Document(name=f"topic {topic}", text=_drop_paragraphs(text, unwanted) + "\n")
    for module, _, tree in _stdlib_trees(heldout=heldout):
        yield Document(name=module, text=_prose_of_module(module, tree, unwanted))


def _stdlib_code(*, heldout: bool) -> Iterator[Document]:
    for module, source, tree in _stdlib_trees(heldout=heldout):
        yield Document(name=module, text=without_docstrings(source, tree))


def _heldout_paragraphs() -> set[str]:
    paragraphs: set[str] = set()
    for document in _stdlib_prose(heldout=True, unwanted=set()):
        _drop_paragraphs(document.text, paragraphs, remember=True)
    return paragraphs


def _package_documents(domain: str, unwanted: set[str]) -> Iterator[Document]:
    """Documents of the installed `BASE_PACKAGES`, each capped, near-copies within them dropped."""
    for package in BASE_PACKAGES:
        roots = [Path(entry, package) for entry in sys.path if Path(entry, package).is_dir()]
        if not roots:
            continue
        # Files in hash order, so that the cap takes a cross-section and not the letter A.
        files = sorted(_python_files(roots[0]), key=lambda item: _hash(f"{package}.{item[0]}"))
        num_bytes = 0
        for module, path in files:
            if num_bytes >= MAX_PACKAGE_BYTES[domain]:
                break
            if (parsed := _parse(path)) is None:
                continue
            name = f"{package}.{module}" if module else package
            if domain == "prose":
                text = _prose_of_module(name, parsed[1], unwanted, remember=True)
            else:
                text = without_docstrings(*parsed)[:20_000]
            num_bytes += len(text.encode())
            yield Document(name=name, text=text)


def _readmes(unwanted: set[str]) -> Iterator[Document]:
    """Long descriptions of the installed distributions."""
    found = {str(dist.metadata["Name"]): dist for dist in importlib.metadata.distributions()}
    for name, dist in sorted(found.items()):
        body = email.message_from_string(dist.read_text("METADATA") or "").get_payload()
        if isinstance(body, str) and not name.lower().startswith("anneal"):
            text = _drop_paragraphs(body[:MAX_README_BYTES], unwanted, remember=True)
            yield Document(name=f"readme {name}", text=text + "\n")


def _documents(domain: str, split: str) -> Iterator[Document]:
    if split == "source-heldout":
        yield from _stdlib_prose(heldout=True, unwanted=set())
    elif split == "source-train":
        yield from _stdlib_prose(heldout=False, unwanted=_heldout_paragraphs())
    elif split in ("target-train", "target-heldout"):
        yield from _stdlib_code(heldout=split == "target-heldout")
    elif domain == "code":
        yield from _package_documents("code", set())
    else:
        unwanted = _heldout_paragraphs()
        yield from _stdlib_prose(heldout=False, unwanted=unwanted)
        yield from _package_documents("prose", unwanted)
        yield from _readmes(unwanted)


def documents(domain: str, split: str, *, max_bytes: int | None = None) -> list[Document]:
    """The documents of a split, in an order fixed by their names' hashes.

    `max_bytes` (UTF-8) cuts the list after the document that would exceed it, and keeps at least one.
    Raises ValueError for a domain or split that does not exist.
    """
    if domain not in SPLITS:
        raise ValueError(f"the domain must be one of {', '.join(SPLITS)}, got {domain!r}")
    if split not in SPLITS[domain]:
        raise ValueError(f"the split of {domain} must be one of {', '.join(SPLITS[domain])}, got {split!r}")
    found = [document for document in _documents(domain, split) if document.text.strip()]
    found.sort(key=lambda document: (_hash(document.name), document.name))
    return found if max_bytes is None else list(_up_to(found, max_bytes))


def _up_to(found: Iterable[Document], max_bytes: int) -> Iterator[Document]:
    num_bytes = 0
    for number, document in enumerate(found):
        num_bytes += len(document.text.encode())
        if number and num_bytes > max_bytes:
            return
        yield document


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--domain", choices=tuple(SPLITS), required=True)
    splits = "; ".join(f"{domain}: {', '.join(names)}" for domain, names in SPLITS.items())
    parser.add_argument("--split", required=True, help=splits)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.jsonl")
    parser.add_argument("--max-bytes", type=int, help="stop before the document that would exceed it")
    args = parser.parse_args()
    try:
        rows = documents(args.domain, args.split, max_bytes=args.max_bytes)
    except ValueError as error:
        parser.error(str(error))
    with args.out.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({"text": row.text, "name": row.name}, ensure_ascii=False) + "\n")
    print(f"{args.out}: {len(rows)} documents, {sum(len(row.text.encode()) for row in rows):,} bytes")


if __name__ == "__main__":
    main()
