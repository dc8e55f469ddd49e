"""summary.md: the results of a run, how to repeat it, and what was trained."""

import platform
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from vae_jax.families import Metric
from vae_jax.run.environment import environment, versions
from vae_jax.run.report import bullets, markdown_table

ARROWS = {"lower": "↓", "higher": "↑"}


class About(NamedTuple):
    """What a summary contains besides the numbers.

    Attributes:
        metrics: what the family's metrics mean.
        images: the number of images in each split.
        layers: the table of `nn.layer_table`.
        routing: lines in Markdown: which term of the loss trains which network.
    """

    metrics: Mapping[str, Metric]
    images: Mapping[str, int]
    layers: Sequence[Sequence[str]]
    routing: Sequence[str] = ()


def summarize(
    title: str,
    numbers: Mapping[str, Any],
    about: About,
    command: str,
    code: str,
    seconds: float,
    figures: Sequence[str],
) -> str:
    """The page in Markdown, with pictures at the paths `figures`; `code` is from `environment.code_version`."""
    facts, (minutes, rest) = environment(numbers["devices"]), divmod(round(seconds), 60)
    said = [
        f"command: `{command}`",
        f"code: {code}",
        f"images: {', '.join(f'{count:,} {split}' for split, count in about.images.items())}",
        f"parameters: {about.layers[-1][-1]}",
        f"time: {minutes} min {rest} s",
        f"device: {facts['devices']}; {facts['CPU cores']} cores of {facts['processor']}, {platform.platform()}",
        f"versions: {', '.join(map(' '.join, versions().items()))}",
        f"matmul precision: {facts['matmul precision']}",
    ]
    parts = [
        f"# {title}",
        markdown_table([["number", "value", "unit (↓ lower is better)"], *rows(numbers, about.metrics)]),
    ]
    if about.routing:
        what = "Which term of the loss trains which network: gradient norms on the first batch, terms unweighted."
        parts += [what, "\n".join(about.routing)]
    parts.append(bullets(said))
    parts += [f"![{name.rpartition('/')[2].partition('.')[0]}]({name})" for name in figures]
    parts += ["## Layers", markdown_table([list(row) for row in about.layers])]
    return "\n\n".join(parts) + "\n"


def rows(numbers: Mapping[str, Any], metrics: Mapping[str, Metric]) -> list[list[str]]:
    """Name, value (with its interval if there is one) and unit of each number; tables are left out."""
    found = []
    for name, value in numbers.items():
        if name.endswith("/interval") or np.ndim(value) > 1:
            continue
        text = describe(value)
        if f"{name}/interval" in numbers and not np.ndim(value):
            text += f" ± {numbers[f'{name}/interval']:.2g} (95 %)"
        found.append([name, text, unit(name, metrics)])
    return found


def unit(name: str, metrics: Mapping[str, Metric]) -> str:
    """The unit of a number such as "test/loss", with an arrow in the better direction; "" if neither is known."""
    metric = metrics.get(name.partition("/")[2])
    if metric is None:
        return ""
    return f"{metric.unit} {ARROWS.get(metric.better, '')}".strip()


def describe(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{entry:.3g}" for entry in value)
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"
