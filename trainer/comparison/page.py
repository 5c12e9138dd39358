"""A comparison as one HTML page that needs nothing else: no network, no files beside it.

Pictures are inline SVG whose points show name and numbers on hover and on keyboard focus; without scripts the browser's
own tooltips do. Colours follow the reader's light or dark setting.
"""

import html
import itertools
from pathlib import Path

from formats.disk.durable import atomic_write_bytes
from formats.disk.output_file import misplaced
from formats.errors import ConfigError
from trainer.comparison.layout import Table, flips_table, main_table, notes_of
from trainer.comparison.lines import Lines
from trainer.comparison.picture import picture_axes
from trainer.comparison.svg import scatter_svg
from trainer.evaluation.tradeoff_picture import require_plottable

STYLE = """
:root { color-scheme: light dark; --c0:#0072b2; --c1:#d55e00; --c2:#009e73; --c3:#cc79a7; --c4:#b07900; --c5:#2d8fc4;
  --c6:#555; --paper:#fff; --ink:#1b1d21; --soft:#5f6368; --grid:#e3e5e8; --row:#eef3f8; }
@media (prefers-color-scheme: dark) { :root { --c0:#4aa8e0; --c1:#ff8c3a; --c2:#2fc79b; --c3:#e29fc6; --c4:#e6b13c;
  --c5:#8ecbee; --c6:#b5b8bd; --paper:#15171a; --ink:#e8e9eb; --soft:#a2a6ac; --grid:#2c3036; --row:#222a33; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); margin: 2rem auto;
  max-width: 72rem; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
figure { margin: 1rem 0; } svg { width: 100%; max-width: 60rem; height: auto; font-size: 12px; }
svg text { fill: var(--soft); } svg .name { fill: var(--ink); } svg .axis { font-size: 13px; }
svg path { stroke-width: 1.6; } svg .grid { stroke: var(--grid); stroke-width: 1; }
svg .cross { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 2 4; fill: none; }
svg .front { stroke: var(--soft); stroke-width: 1; stroke-dasharray: 6 4; fill: none; }
svg .point { cursor: pointer; outline: none; } svg .point path { stroke: var(--paper); stroke-width: 1; }
svg .point:focus-visible circle, svg .point:hover circle { stroke: currentColor; stroke-width: 2; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--grid); }
th { color: var(--soft); font-weight: 600; } .word { text-align: left; } tr.lit { background: var(--row); }
#tip { position: fixed; z-index: 1; pointer-events: none; white-space: pre-line; background: var(--ink);
  color: var(--paper); padding: .4rem .6rem; border-radius: .3rem; font-size: 13px; max-width: 24rem; }
[hidden] { display: none; } select { max-width: 100%; } li { margin: .2rem 0; }
"""

SCRIPT = """
const tip = document.getElementById('tip');
for (const point of document.querySelectorAll('.point')) {
  point.querySelector('title').remove();
  const rows = [...document.querySelectorAll('tr[data-label]')].filter(r => r.dataset.label === point.dataset.label);
  const show = () => {
    tip.textContent = point.getAttribute('aria-label'); tip.hidden = false;
    const box = point.getBoundingClientRect(), own = tip.getBoundingClientRect();
    tip.style.left = Math.max(4, Math.min(box.right + 6, innerWidth - own.width - 4)) + 'px';
    tip.style.top = Math.max(4, Math.min(box.top - 6, innerHeight - own.height - 4)) + 'px';
    rows.forEach(row => row.classList.add('lit'));
  };
  const hide = () => { tip.hidden = true; rows.forEach(row => row.classList.remove('lit')); };
  point.addEventListener('mouseenter', show); point.addEventListener('focus', show);
  point.addEventListener('mouseleave', hide); point.addEventListener('blur', hide);
  point.addEventListener('keydown', event => { if (event.key === 'Escape') hide(); });
}
const choice = document.getElementById('choice');
if (choice) choice.addEventListener('change', () => {
  for (const figure of document.querySelectorAll('figure')) figure.hidden = figure.id !== choice.value;
});
"""

POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
"""The page may load nothing from anywhere; browsers hold it to that."""


def require_page(path: str | Path) -> Path:
    """Find out before the work whether a page can be written to `path`; nothing is written.

    Raises:
        ConfigError: another ending, or no place for it (`misplaced`).
    """
    path = Path(path)
    ours = path.suffix.lower() in (".html", ".htm")
    if reason := misplaced(path) if ours else "another ending":
        raise ConfigError(f"the page must go to a writable .html file, got {path}: {reason}")
    return path


def require_writable(plot: Path | None, page: Path | None) -> None:
    """Refuse a picture or page of a comparison that could not be written, before anything is computed.

    Raises:
        ConfigError: another ending, or no place for it.
    """
    if plot is not None:
        require_plottable(plot)
    if page is not None:
        require_page(page)


def write_page(comparison: Lines, path: str | Path) -> Path:
    """Write the page.

    Raises:
        ConfigError: as `require_page`, or the file cannot be written.
    """
    path = require_page(path)
    try:
        atomic_write_bytes(path, page_html(comparison).encode())
    except OSError as error:
        raise ConfigError(
            f"the page must go to a writable .html file, got {path}: {error.strerror or error}"
        ) from None
    return path


def page_html(comparison: Lines) -> str:
    """The page as text."""
    pictures = _pictures(comparison)
    flips = flips_table(comparison)
    body = ["<h1>What was learnt, what was kept</h1>"]
    if len(pictures) > 1:
        options = "".join(
            f'<option value="picture-{n}">{html.escape(name)}</option>'
            for n, (name, _) in enumerate(pictures)
        )
        body.append(f'<p><label>Picture: <select id="choice">{options}</select></label></p>')
    for number, (name, svg) in enumerate(pictures):
        hidden = " hidden" if number else ""
        body.append(f'<figure id="picture-{number}" aria-label="{html.escape(name)}"{hidden}>{svg}</figure>')
    body.append("<h2>Models</h2>" + _table(main_table(comparison), "models"))
    if flips is not None:
        body.append(f"<h2>Items against {html.escape(str(comparison.initial))}</h2>" + _table(flips, "items"))
    body.append(
        "<h2>Notes</h2><ul>"
        + "".join(f"<li>{html.escape(line)}</li>" for line in notes_of(comparison))
        + "</ul>"
    )
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>anneal compare</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f'\n</main>\n<div id="tip" role="tooltip" hidden></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


def _pictures(comparison: Lines) -> list[tuple[str, str]]:
    """(name, SVG): the whole, and every pair of a source and a target metric where there are several."""
    pairs = list(itertools.product(comparison.of_side("source"), comparison.of_side("target")))
    asked = [None, *pairs] if len(pairs) > 1 else [None]
    tips = _tips(comparison)
    found = []
    for pair in asked:
        axes = picture_axes(comparison, pair)
        name = (
            "all metrics"
            if pair is None and pairs[1:]
            else f"{axes.source_label} against {axes.target_label}"
        )
        svg = scatter_svg(
            axes, initial=comparison.initial or "", families=comparison.families(), tips=tips, title=name
        )
        if svg:
            found.append((name, svg))
    return found


def _tips(comparison: Lines) -> dict[str, str]:
    """Label -> name, method and every cell of the line, one a line."""
    table = main_table(comparison)
    groups, last = [], ""
    for at, group in enumerate(table.groups):
        last = group or (last if at > table.num_words else "")
        groups.append(last)
    found = {}
    for label, row in zip(table.labels, table.rows, strict=True):
        lines = [row[0][2:], *([row[1]] if row[1] != "-" else [])]
        for group, head, cell in list(zip(groups, table.header, row, strict=True))[table.num_words :]:
            if cell:
                lines.append(f"{group} {head}: {cell}")
        found[label] = "\n".join(lines)
    return found


def _table(table: Table, name: str) -> str:
    def cells(words: list[str], tag: str) -> str:
        shown = []
        for at, word in enumerate(words):
            kind = ' class="word"' if at < table.num_words else ""
            scope = ' scope="col"' if tag == "th" else ""
            shown.append(f"<{tag}{kind}{scope}>{html.escape(word)}</{tag}>")
        return "".join(shown)

    head = f"<tr>{cells(table.groups, 'th')}</tr>" if any(table.groups) else ""
    rows = "".join(
        f'<tr data-label="{html.escape(label, quote=True)}">{cells(row, "td")}</tr>'
        for label, row in zip(table.labels, table.rows, strict=True)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="table of {name}"><table><thead>{head}'
        f"<tr>{cells(table.header, 'th')}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
