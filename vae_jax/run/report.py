"""Reports in Markdown, and the self-contained HTML page made from one."""

import base64
import html
import itertools
import re
from pathlib import Path

from markdown_it import MarkdownIt

NUMBER = re.compile(r"[-+]?[\d.,]+( ?%)?( ± [\d.]+( ?%)?)?")
# The space between a number and its interval or percent sign: no line may break there.
GAP = re.compile(r"(?:^|(?<=\d)) (?=[±%])|(?<=±) ")
LONG = 24  # a cell with more characters counts as a sentence


def markdown_table(cells: list[list[str]]) -> str:
    """A Markdown table of `cells`; the first row is the heading, and columns of numbers are aligned right."""
    heading, *body = [[text.replace("|", r"\|") for text in row] for row in cells]
    columns = [[row[i].replace("*", "") for row in body] for i in range(len(heading))]
    numeric = [all(NUMBER.fullmatch(text) for text in filter(None, c)) for c in columns]
    rule = ["---:" if aligned else "---" for aligned in numeric]
    return "\n".join(f"| {' | '.join(row)} |" for row in [heading, rule, *body])


def bullets(sentences: list[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def to_html(markdown: str, folder: Path) -> str:
    """One HTML page, images inlined, for wide and narrow, light and dark screens.

    Image paths are relative to `folder`; the first heading becomes the title.
    """
    parser = MarkdownIt("js-default")  # escapes HTML, knows tables
    tokens = parser.parse(markdown)
    title = ""
    for opening, token in itertools.pairwise(tokens):
        if opening.type == "heading_open":
            title = title or token.content
        if opening.type == "td_open" and len(token.content) > LONG:
            opening.attrSet("class", "sentence")
        for child in token.children or ():
            if child.type == "image":
                content = (folder / child.attrGet("src")).read_bytes()
                inlined = base64.b64encode(content).decode()
                child.attrSet("src", f"data:image/png;base64,{inlined}")
            elif child.type == "text":
                child.content = GAP.sub("\N{NO-BREAK SPACE}", child.content)
    body = parser.renderer.render(tokens, parser.options, {})
    return PAGE.format(title=html.escape(title), style=STYLE, body=body)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
{body}</main>
</body>
</html>
"""
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
p:has(+ table) { margin: 1.6rem 0 .4rem; }
p:has(> img) { max-width: none; margin: 1.6rem 0 0; }
p:has(> img) + p { color: var(--soft); font-size: .9rem; margin-top: .5rem; }
img { max-width: 100%; max-height: 46rem; background: #fff; border-radius: 6px; box-shadow: 0 0 0 1px var(--line); }
table { display: block; width: max-content; max-width: 100%; overflow-x: auto; border-collapse: collapse; font-size: .92rem; }
th, td { padding: .35rem .8rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { background: var(--band); border-bottom: 2px solid var(--line); }
[style] { white-space: nowrap; font-variant-numeric: tabular-nums; }
.sentence { min-width: 9rem; }
code { font-size: .88em; background: var(--band); padding: .08em .3em; border-radius: 4px; overflow-wrap: anywhere; }
pre { background: var(--band); padding: .8rem 1rem; border-radius: 6px; overflow-x: auto; }
pre code { background: none; padding: 0; overflow-wrap: normal; }
"""
