"""Reports in Markdown, and the self-contained HTML page made from one."""

import base64
import html
import itertools
import re
from pathlib import Path
from string import Template

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
    page = Template(Path(__file__).with_name("page.html").read_text("utf-8"))
    return page.substitute(title=html.escape(title), body=body)
