"""A report as a list of blocks, and its two forms: Markdown beside its figures, and one self-contained HTML file."""

import base64
import html
import re
from pathlib import Path
from typing import NamedTuple


class Heading(NamedTuple):
    text: str
    level: int = 2


class Text(NamedTuple):
    """A paragraph. `code` and **bold** are marked as in Markdown."""

    text: str


class Items(NamedTuple):
    """A list of paragraphs."""

    texts: list


class Table(NamedTuple):
    cells: list  # rows of strings, the first one being the heading
    caption: str = ""


class Picture(NamedTuple):
    path: str  # relative to the report
    caption: str
    width: int = 900  # pixels at most


class Code(NamedTuple):
    text: str


def markdown_table(cells: list) -> str:
    heading, *body = cells
    lines = [heading, ["---"] * len(heading), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def to_markdown(blocks: list) -> str:
    def one(block):
        match block:
            case Heading(text, level):
                return f"{'#' * level} {text}"
            case Text(text):
                return text
            case Items(texts):
                return "\n".join(f"- {text}" for text in texts)
            case Table(cells, caption):
                return (f"**{caption}**\n\n" if caption else "") + markdown_table(cells)
            case Picture(path, caption, width):
                return f'<img src="{path}" width="{width}" alt="{html.escape(caption)}">\n\n*{caption}*'
            case Code(text):
                return f"```sh\n{text}\n```"

    return "\n\n".join(map(one, blocks)) + "\n"


def to_html(blocks: list, folder: Path) -> str:
    """One file, its pictures inside, for wide and narrow, light and dark screens. Pictures are read from `folder`."""
    title = next(block.text for block in blocks if isinstance(block, Heading))

    def one(block):
        match block:
            case Heading(text, level):
                return f"<h{level}>{_inline(text)}</h{level}>"
            case Text(text):
                return f"<p>{_inline(text)}</p>"
            case Items(texts):
                items = "".join(f"<li>{_inline(text)}</li>" for text in texts)
                return f"<ul>{items}</ul>"
            case Table(cells, caption):
                return _table(cells, caption)
            case Picture(path, caption, width):
                content = base64.b64encode((folder / path).read_bytes()).decode()
                return (
                    f'<figure><img src="data:image/png;base64,{content}" alt="{html.escape(caption)}" '
                    f'style="max-width:min(100%,{width}px)"><figcaption>{_inline(caption)}</figcaption></figure>'
                )
            case Code(text):
                return f"<pre><code>{html.escape(text)}</code></pre>"

    body = "\n".join(map(one, blocks))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _table(cells, caption):
    """Columns of numbers are set to the right, so that they line up; those of sentences stay wide on a narrow screen."""
    kinds = [_kind(column) for _, *column in zip(*cells)]

    def row(line, tag, scope=""):
        pairs = zip(kinds, map(_inline, line))
        return f"<tr>{''.join(f'<{tag}{scope}{kind}>{text}</{tag}>' for kind, text in pairs)}</tr>"

    title = f"<figcaption>{_inline(caption)}</figcaption>" if caption else ""
    head = row(cells[0], "th", ' scope="col"')
    body = "".join(row(line, "td") for line in cells[1:])
    return (
        f'<figure class="table">{title}<div><table><thead>{head}</thead>'
        f"<tbody>{body}</tbody></table></div></figure>"
    )


def _kind(column):
    """The attribute of all cells of a column."""
    number = r"[-+]?[\d.,]+( ?%)?( ± [\d.]+( ?%)?)?"
    if all(re.fullmatch(number, text.replace("*", "")) for text in column if text):
        return " class=number"
    return " class=words" if max(map(len, column)) > 24 else ""


def _inline(text):
    """HTML, in which a number stays on one line with its interval and its %."""
    text = re.sub(r"(?<=[\d*]) (?=[±%])|(?<=±) ", "\N{NO-BREAK SPACE}", text)
    text = html.escape(text, quote=False)
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", text)
    return re.sub(r"\*\*([^*]+)\*\*", r"<strong>\1</strong>", text)


STYLE = """
:root { color-scheme: light dark; --ink: #1d2129; --soft: #5a6270; --line: #d9dde3; --paper: #ffffff; --band: #f4f6f9; --mark: #1b4f8a; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ec; --soft: #a3abb8; --line: #3a414c; --paper: #14171c; --band: #1d2229; --mark: #8fb3d9; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.25; margin: 0 0 1rem; }
h2 { font-size: 1.35rem; margin: 2.8rem 0 .8rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); color: var(--mark); }
p, ul { max-width: 46rem; }
.table { margin: 1.2rem 0; }
.table div { overflow-x: auto; }
.table figcaption { color: var(--ink); font-weight: 600; margin: 0 0 .4rem; }
table { border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--band); border-bottom: 2px solid var(--line); }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
.words { min-width: 9rem; }
figure { margin: 1.6rem 0; }
figure img { display: block; background: #fff; border-radius: 6px; box-shadow: 0 0 0 1px var(--line); }
figcaption { color: var(--soft); font-size: .9rem; margin-top: .5rem; max-width: 46rem; }
code { font-size: .88em; background: var(--band); padding: .08em .3em; border-radius: 4px; overflow-wrap: anywhere; }
pre { background: var(--band); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
"""
