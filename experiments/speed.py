"""Images per second of this package, of the same model in plain Flax and in PyTorch, and the device's limit.

    python -m experiments.speed [--model=both] [--precision=both] [--batch_size=128] [--steps=20] [--rounds=9] [--out=speed]
    python -m experiments.speed --sweep --out=sweep     microseconds per image by batch size and width of the network

Each round times every implementation once, so ratios hold even if the machine's speed drifts; the table gives the
median over rounds, the lowest and the highest. The limit is the rate of a large matrix product in the same rounds. The
share of it counts only the arithmetic of the model's convolutions and dense layers. PyTorch takes part if it is
installed. --out writes a table (.json) and a chart (.png).
"""

import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from experiments import launch, speed_peers
from experiments.speed_peers import MODELS, Work
from vae_jax.run.files import save_figure, write_atomically

PRECISIONS = ["float32", "bfloat16"]
# Height of the feature map that each layer's kernel is applied to (the post, Tables 1, 2 and 4).
HEIGHTS = {
    "vae": {"conv1": 14, "conv2": 7, "fc": 1, "tconv1": 1, "tconv2": 7, "tconv3": 14, "tconv4": 28},
    "classifier": {"conv1": 28, "conv2": 14, "conv3": 7, "fc": 1},
}


class Peer(NamedTuple):
    group: str  # the peers it is compared with: "vae, training, float32", ...
    name: str
    run: Callable[[], None]
    work: float  # per run: images, or operations of a matrix product


def make_peers(model: str, precisions: list[str], work: Work) -> list[Peer]:
    """Every implementation of a model, in training and evaluation."""
    peers, torch_forms = [], speed_peers.torch_forms()
    for precision in precisions:
        for train in (True, False):
            runs = {}
            ours = speed_peers.ours(model, precision=precision)
            evaluate = functools.partial(speed_peers.evaluate_split, precision=precision)
            runs["ours"] = (speed_peers.train_in_loop if train else evaluate)(ours, work)
            if precision == "float32":
                by_steps = speed_peers.train_by_steps if train else speed_peers.evaluate_by_steps
                runs["plain Flax"] = by_steps(speed_peers.plain_flax(model), work)
            for name, form in torch_forms.items():
                runs[f"PyTorch {name}"] = speed_peers.torch_run(model, work, precision, train, **form)
            group = f"{model}, {'training' if train else 'evaluation'}, {precision}"
            peers += [Peer(group, name, run, work.images) for name, run in runs.items()]
    return peers


def product_peers(precisions: list[str]) -> list[Peer]:
    """The device's limit: large square matrix products, operands in each precision and sums in float32."""
    size = 8192 if jax.default_backend() == "gpu" else 2048

    def make(precision):
        key = jax.random.key(0)
        a, b = jax.random.normal(key, (2, size, size)).astype(precision)
        multiply = jax.jit(functools.partial(jnp.matmul, preferred_element_type=jnp.float32))
        return lambda: jax.block_until_ready(multiply(a, b))

    return [Peer(f"matrix product, {precision}", "limit", make(precision), 2 * size**3) for precision in precisions]


def operations(model: str, train: bool) -> float:
    """Additions and multiplications per image in the layers' products.

    The backward pass takes two products of the forward pass's size for every layer but the first, which needs no
    gradient with respect to the image.
    """
    variables = jax.eval_shape(speed_peers.ours(model).init, jax.random.key(0))
    forward = {
        path[-2].key: 2 * leaf.size * HEIGHTS[model][path[-2].key] ** 2
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    }
    total = sum(forward.values())
    return 3 * total - forward["conv1"] if train else total


def measure(peers: list[Peer], rounds: int) -> list[np.ndarray]:
    """Work per second of each peer in each round, after two runs that compile and warm up.

    Each round has its own random order, because the run after a large one pays for memory that was freed.
    """
    rates, rng = np.zeros((len(peers), rounds)), np.random.default_rng(0)
    for peer in peers:
        peer.run()
        peer.run()
    for number in range(rounds):
        for i in rng.permutation(len(peers)):
            start = time.perf_counter()
            peers[i].run()
            rates[i, number] = peers[i].work / (time.perf_counter() - start)
    return [*rates]


def median_and_range(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "lowest": float(values.min()), "highest": float(values.max())}


def compare(peers: list[Peer], rates: list) -> list[dict]:
    """One row per peer: its rate, how many times as fast ours is, and its share of the limit."""
    by_name = {(p.group, p.name): np.array(own) for p, own in zip(peers, rates)}
    rows = []
    for (group, name), own in by_name.items():
        row = {"group": group, "name": name} | median_and_range(own)
        if name != "limit":
            model, kind, precision = group.split(", ")
            limit = by_name[f"matrix product, {precision}", "limit"]
            work = operations(model, kind == "training")
            row["ours is"] = float(np.median(by_name[group, "ours"] / own))
            row["share of the limit"] = float(np.median(own * work / limit))
        rows.append(row)
    return rows


def by_group(rows: list[dict]) -> dict[str, list[dict]]:
    """{group: its rows}, without the limits."""
    groups = {}
    for row in rows:
        if row["name"] != "limit":
            groups.setdefault(row["group"], []).append(row)
    return groups


def show(rows: list[dict]) -> None:
    """Print the limits, then a table per group."""
    for row in rows:
        if row["name"] == "limit":
            rate, *ends = (row[name] / 1e9 for name in ("median", "lowest", "highest"))
            print(f"{row['group']}: {rate:,.0f} GFLOP/s ({ends[0]:,.0f} to {ends[1]:,.0f})")
    for group, own in by_group(rows).items():
        print(f"\n{group + ', images/s':36} {'median':>9} {'lowest':>9} {'highest':>9} {'ours is':>8} {'of limit':>8}")
        for row in own:
            print(
                f"{row['name']:36} {row['median']:9,.0f} {row['lowest']:9,.0f} {row['highest']:9,.0f} "
                f"{row['ours is']:7.2f}x {row['share of the limit']:8.1%}"
            )


def verdict(rows: list[dict]) -> str:
    """The speed of our training relative to the others', in one line."""
    sentences = []
    for group, own in by_group(rows).items():
        ratios = {row["name"]: row["ours is"] for row in own}
        against = []
        if "plain Flax" in ratios:
            against.append(f"{ratios['plain Flax']:.1f} times plain Flax")
        if by_torch := [x for name, x in ratios.items() if "PyTorch" in name]:
            against.append(f"{min(by_torch):.2f} times PyTorch's best")
        if against and "training" in group:
            sentences.append(f"{group}: ours is {' and '.join(against)}")
    return "; ".join(sentences)


def draw(rows: list[dict], title: str) -> Figure:
    """Bars of the medians, one panel per group."""
    groups = by_group(rows)
    height = -(-len(groups) // 2)
    figure = Figure(figsize=(13, 2.1 * height + 1), layout="constrained")
    panels = figure.subplots(height, 2, squeeze=False).flat
    for ax, (group, own) in zip(panels, groups.items()):
        names = [row["name"] for row in own]
        rates = [row["median"] for row in own]
        colors = ["#1b4f8a" if name == "ours" else "#b8c4d4" for name in names]
        bars = ax.barh(names, rates, color=colors)
        ax.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3)
        ax.invert_yaxis()
        ax.margins(x=0.16)
        ax.set(title=group, xticks=[])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title)
    return figure


def sweep(
    rounds: int,
    out: str | None,
    batch_sizes: tuple[int, ...] = (32, 64, 128, 256, 512, 1024, 2048),
    widths: tuple[int, ...] = (1, 2, 4),
) -> None:
    """Time per image of our training, by batch size and width of the network."""
    peers = []
    for width in widths:
        vae = speed_peers.ours(
            "vae", encoder_features=(32 * width, 64 * width), decoder_features=(64 * width, 32 * width)
        )
        for batch_size in batch_sizes:
            steps = max(max(batch_sizes) // batch_size // width, 1)
            work = speed_peers.random_work(batch_size, steps)
            run = speed_peers.train_in_loop(vae, work)
            peers.append(Peer(f"{width}x", str(batch_size), run, work.images))
    lines = {f"{width}x": [] for width in widths}
    for peer, rates in zip(peers, measure(peers, rounds)):
        row = {"width": peer.group, "batch size": int(peer.name)}
        lines[peer.group].append(row | median_and_range(1e6 / rates))
    for width, rows in lines.items():
        cells = [f"{row['batch size']}: {row['median']:.1f}" for row in rows]
        print(f"width {width}, us per image by batch size: {', '.join(cells)}")
    title = f"Training the VAE: {device_name()}; median and range of {rounds} rounds"
    table = [row for rows in lines.values() for row in rows]
    write(out, {"machine": machine(), "rows": table}, draw_sweep(lines, title))


def draw_sweep(lines: dict[str, list[dict]], title: str) -> Figure:
    """Microseconds per image by batch size, one line per width of the network."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for width, rows in lines.items():
        batch_sizes, median, lowest, highest = (
            [row[name] for row in rows] for name in ("batch size", "median", "lowest", "highest")
        )
        (line,) = ax.loglog(batch_sizes, median, "o-", label=f"width {width}")
        shade = {"color": line.get_color(), "alpha": 0.15, "linewidth": 0}
        ax.fill_between(batch_sizes, lowest, highest, **shade)
    ax.set(xlabel="batch size", ylabel="microseconds per image", title=title)
    ax.set_xticks(batch_sizes, [f"{size:g}" for size in batch_sizes])
    ax.xaxis.minorticks_off()
    for ticks in (ax.yaxis.set_major_formatter, ax.yaxis.set_minor_formatter):
        ticks(LogFormatter(minor_thresholds=(2, 1)))
    ax.grid(alpha=0.3, which="both")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return figure


def device_name() -> str:
    cores = len(os.sched_getaffinity(0))
    device = jax.devices()[0]
    return f"{cores} CPU cores" if device.platform == "cpu" else device.device_kind


def machine() -> str:
    """The device and the versions of Python and the libraries."""
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in ("jax", "jaxlib", "flax", "optax", "torch")
        if importlib.util.find_spec(name)
    ]
    return ", ".join([device_name(), f"Python {platform.python_version()}", *versions])


def write(out: str | None, table: dict, figure: Figure) -> None:
    """Write `out`.json and `out`.png, if `out` is given."""
    if out:
        write_atomically(Path(f"{out}.json"), json.dumps(table, indent=1) + "\n")
        save_figure(figure, Path(f"{out}.png"))


def main() -> None:
    given = flags.FLAGS
    print(machine())
    if given.sweep:
        for name in ("model", "precision", "batch_size", "steps"):
            if given[name].present:
                raise app.UsageError(f"--{name} has no effect with --sweep")
        return sweep(given.rounds, given.out)
    work = speed_peers.random_work(given.batch_size, given.steps)
    precisions = PRECISIONS if given.precision == "both" else [given.precision]
    peers = product_peers(precisions)
    for model in MODELS if given.model == "both" else [given.model]:
        peers += make_peers(model, precisions, work)
    print(f"batch {work.batch_size}, {given.rounds} interleaved rounds of {work.steps} steps")
    rows = compare(peers, measure(peers, given.rounds))
    show(rows)
    title = f"Images per second: {device_name()}, batch {work.batch_size}"
    write(given.out, {"machine": machine(), "rows": rows}, draw(rows, title))
    print(f"\n{verdict(rows)}")


def define_flags() -> None:
    flags.DEFINE_enum("model", "both", [*MODELS, "both"], "The model.")
    flags.DEFINE_enum(
        "precision",
        "both",
        [*PRECISIONS, "both"],
        "The layers' precision.",
    )
    flags.DEFINE_integer("batch_size", 128, "Images per step.", lower_bound=1)
    flags.DEFINE_integer("steps", 20, "Steps per run.", lower_bound=1)
    flags.DEFINE_integer("rounds", 9, "Timed rounds.", lower_bound=1)
    flags.DEFINE_bool("sweep", False, "Sweep batch size and width of our VAE instead.")
    flags.DEFINE_string("out", None, "Write OUT.json and OUT.png.")


if __name__ == "__main__":
    define_flags()
    launch.start("speed", main)
