"""Images a second: ours, the same model in plain Flax, PyTorch's best, and what the device allows. One interleaved run.

    python -m experiments.speed [--model=both] [--precision=both] [--batch_size=128] [--steps=20] [--rounds=9] [--out=speed]
    python -m experiments.speed --sweep --out=sweep     time an image by batch size and width of the network, ours alone

Every peer trains the post's VAE, or its classifier, by Adam on the same batches of uint8 images held in the device's
memory, and evaluates its loss. Each round times every peer once, so that ratios hold where the machine's speed drifts;
reported is the median over rounds with the lowest and highest. The limit is the rate of a large matrix product in the same
rounds: the share of it that a peer reaches counts the arithmetic of the model's layers alone. PyTorch is a peer where it
is installed. With --out there are a table (.json) and a chart (.png) too.
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

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch is here too

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from vae_jax.batch import Split, make_batch
from vae_jax.nn.networks import make_classifier, make_vae
from vae_jax.objectives import cross_entropy, elbo
from vae_jax.run.evaluate import make_evaluate
from vae_jax.run.files import save_figure, write_whole
from vae_jax.run.loop import make_run_chunk
from vae_jax.steps import init_state, jit_train_step, make_eval_step, make_train_step

_MODEL = flags.DEFINE_enum("model", "both", ["vae", "classifier", "both"], "Which.")
_PRECISION = flags.DEFINE_enum(
    "precision",
    "both",
    ["float32", "bfloat16", "both"],
    "Which. A CPU without instructions for bfloat16 takes long over it.",
)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "steps", 20, "Steps a peer takes in one round.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed rounds.", lower_bound=1)
_SWEEP = flags.DEFINE_bool("sweep", False, "Ours by batch size and width instead.")
_OUT = flags.DEFINE_string("out", None, "Write OUT.json and OUT.png too.")
IMAGE_SHAPE = (28, 28, 1)
PRECISIONS = ["float32", "bfloat16"]
# How often a layer's kernel is applied to one image (the post, Tables 1, 2 and 4).
PLACES = {
    "vae": {
        "conv1": 14 * 14,
        "conv2": 7 * 7,
        "fc": 1,
        "tconv1": 1,
        "tconv2": 7 * 7,
        "tconv3": 14 * 14,
        "tconv4": 28 * 28,
    },
    "classifier": {"conv1": 28 * 28, "conv2": 14 * 14, "conv3": 7 * 7, "fc": 1},
}


class Peer(NamedTuple):
    group: str  # what it is compared with: "vae, training, float32", ...
    name: str
    run: Callable[[], None]
    work: float  # images, or operations of a matrix product, in a run


class PlainVAE(nn.Module):
    """The VAE as one writes it with Flax's own layers."""

    def setup(self):
        glorot = nn.initializers.glorot_uniform()
        conv = functools.partial(
            nn.Conv, kernel_size=(3, 3), padding="SAME", kernel_init=glorot
        )
        conv_transpose = functools.partial(
            nn.ConvTranspose, padding="SAME", kernel_init=glorot
        )
        self.conv1, self.conv2 = conv(32, strides=(2, 2)), conv(64, strides=(2, 2))
        self.fc = nn.Dense(40, kernel_init=glorot)
        self.tconv1 = conv_transpose(64, (7, 7), (7, 7))
        self.tconv2, self.tconv3 = (
            conv_transpose(64, (3, 3), (2, 2)),
            conv_transpose(32, (3, 3), (2, 2)),
        )
        self.tconv4 = conv_transpose(1, (3, 3), (1, 1))

    def encode(self, image):
        x = nn.relu(self.conv2(nn.relu(self.conv1(image))))
        return jnp.split(self.fc(x.reshape(x.shape[0], -1)), 2, axis=-1)

    def decode(self, z):
        x = nn.relu(self.tconv1(z[:, None, None, :]))
        return nn.sigmoid(self.tconv4(nn.relu(self.tconv3(nn.relu(self.tconv2(x))))))

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


class PlainClassifier(nn.Module):
    """The classifier as one writes it with Flax's own layers."""

    @nn.compact
    def __call__(self, x, train=False, axis_name=None):
        for i, features in enumerate((8, 16, 32)):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(not train, axis_name=axis_name, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if i < 2 else x
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


def vae_objective(network):
    encode, decode = (
        functools.partial(network.apply, method=method)
        for method in ("encode", "decode")
    )
    return functools.partial(elbo, encode=encode, decode=decode)


def classifier_objective(network):
    apply = functools.partial(network.apply, mutable=["batch_stats"])
    return functools.partial(cross_entropy, apply=apply)


def initial_state(network, optimizer):
    variables = jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE)))
    return init_state(variables, optimizer, jax.random.key(1))


def train_ours(network, objective, images, labels, batch_size, steps):
    """Our model in our loop: a chunk of steps in one program."""
    optimizer = optax.adam(1e-3)
    state = initial_state(network, optimizer)
    train_step = make_train_step(objective, optimizer)
    run_chunk = jax.jit(make_run_chunk(train_step, batch_size, steps), donate_argnums=0)
    order = np.arange(len(images), dtype=np.int32)
    data = jax.device_put((order, images, labels))

    def run():
        nonlocal state
        state, _ = run_chunk(state, data[0], 0, steps, *data[1:])
        jax.block_until_ready(state)

    return run


def evaluate_ours(network, objective, images, labels, batch_size, steps):
    """Our evaluation of a split in one program; the arrays are brought to the host."""
    del steps
    state = initial_state(network, optax.adam(1e-3))
    evaluate = make_evaluate(objective, Split(images, labels), batch_size=batch_size)
    return lambda: evaluate(state.variables, state.key)


def train_plain(network, objective, images, labels, batch_size, steps):
    """The same model in Flax's layers, with a jitted step."""
    optimizer = optax.adam(1e-3)
    state = initial_state(network, optimizer)
    step = jit_train_step(objective, optimizer)
    take = make_take(images, labels, batch_size)

    def run():
        nonlocal state
        for i in range(steps):
            state, _ = step(state, take(i))
        jax.block_until_ready(state)

    return run


def evaluate_plain(network, objective, images, labels, batch_size, steps):
    """The same model in Flax's layers, with a jitted evaluation of one batch."""
    state = initial_state(network, optax.adam(1e-3))
    step = jax.jit(make_eval_step(objective))
    take = make_take(images, labels, batch_size)
    return lambda: jax.device_get(
        [step(state.variables, take(i), state.key)["loss"] for i in range(steps)]
    )


def make_take(images, labels, batch_size):
    images, labels = jax.device_put((images, labels))
    batch = jax.jit(
        lambda images, labels, rows: make_batch(
            images[rows], labels[rows], jnp.ones(batch_size), rows
        )
    )
    return lambda i: batch(
        images, labels, jnp.arange(i * batch_size, (i + 1) * batch_size)
    )


def torch_vae():
    """The VAE in PyTorch: (images, labels) -> loss."""
    import torch
    from torch import nn as tnn
    from torch.nn import functional as F

    class TorchVAE(tnn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2 = (
                tnn.Conv2d(1, 32, 3, 2, 1),
                tnn.Conv2d(32, 64, 3, 2, 1),
            )
            self.fc = tnn.Linear(3136, 40)
            self.tconv1 = tnn.Linear(
                20, 3136, bias=False
            )  # as ours: faster than ConvTranspose2d of a 1x1 map
            self.tconv1_bias = tnn.Parameter(torch.zeros(64, 1, 1))
            self.tconv2 = tnn.ConvTranspose2d(64, 64, 3, 2, 1, 1)
            self.tconv3 = tnn.ConvTranspose2d(64, 32, 3, 2, 1, 1)
            self.tconv4 = tnn.ConvTranspose2d(32, 1, 3, 1, 1)

        def forward(self, image, label):
            x = F.relu(self.conv2(F.relu(self.conv1(image))))
            mean, logvar = self.fc(x.flatten(1)).chunk(2, dim=1)
            z = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
            x = F.relu(self.tconv1(z).view(-1, 64, 7, 7) + self.tconv1_bias)
            out = torch.sigmoid(
                self.tconv4(F.relu(self.tconv3(F.relu(self.tconv2(x)))))
            )
            kl = -0.5 * (1 + logvar - mean**2 - torch.exp(logvar)).sum()
            return (0.5 * ((image - out) ** 2).sum() + kl) / len(image)

    return TorchVAE()


def torch_classifier():
    """The classifier in PyTorch: (images, labels) -> loss."""
    from torch import nn as tnn
    from torch.nn import functional as F

    class TorchClassifier(tnn.Module):
        def __init__(self):
            super().__init__()
            self.layers = tnn.Sequential()
            for c_in, c_out in [(1, 8), (8, 16), (16, 32)]:
                self.layers.append(tnn.Conv2d(c_in, c_out, 3, padding=1))
                self.layers.append(tnn.BatchNorm2d(c_out))
                self.layers.append(tnn.ReLU())
                if c_out < 32:
                    self.layers.append(tnn.MaxPool2d(2))
            self.layers.extend([tnn.Flatten(), tnn.Linear(7 * 7 * 32, 10)])

        def forward(self, image, label):
            return F.cross_entropy(self.layers(image), label)

    return TorchClassifier()


def pytorch(network, images, labels, batch_size, steps, layout, mode, precision, train):
    """The same model in PyTorch, trained by fused Adam or evaluated; compiled by `mode`, if it is one."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    layout = torch.channels_last if layout else torch.contiguous_format
    network = network.to(device, memory_format=layout).train(train)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    loss = torch.compile(network, mode=mode) if mode else network
    images = torch.from_numpy(images).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(labels).long().to(device)
    autocast = torch.autocast(
        device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=train
    )

    def run():
        total = 0.0
        for i in range(steps):
            rows = slice(i * batch_size, (i + 1) * batch_size)
            image = (images[rows].float() / 255).contiguous(memory_format=layout)
            with autocast, torch.set_grad_enabled(train):
                value = loss(image, labels[rows])
            if train:
                optimizer.zero_grad(set_to_none=True)
                value.backward()
                optimizer.step()
            total += value.detach()
        float(total)  # waits for the device

    return run


# Ours, in Flax's layers, the objective of both, in PyTorch.
MODELS = {
    "vae": (make_vae, PlainVAE(), vae_objective, torch_vae),
    "classifier": (
        functools.partial(make_classifier, num_classes=10),
        PlainClassifier(),
        classifier_objective,
        torch_classifier,
    ),
}


def make_peers(
    model: str, precisions: list, data: tuple, batch_size: int, steps: int
) -> list[Peer]:
    make_network, plain, make_objective, make_torch = MODELS[model]
    torch_forms = pytorch_forms()
    load, peers = (*data, batch_size, steps), []
    for precision in precisions:
        network = make_network(IMAGE_SHAPE, precision=precision)
        for train in (True, False):
            group = f"{model}, {'training' if train else 'evaluation'}, {precision}"

            def add(name, run, group=group):
                peers.append(Peer(group, name, run, batch_size * steps))

            ours = train_ours if train else evaluate_ours
            add("ours", ours(network, make_objective(network), *load))
            if precision == "float32":
                flax_ = train_plain if train else evaluate_plain
                add("plain Flax", flax_(plain, make_objective(plain), *load))
            for name, form in torch_forms.items():
                run = pytorch(make_torch(), *load, *form, precision, train)
                add(f"PyTorch {name}", run)
    return peers


def pytorch_forms() -> dict[str, tuple]:
    """{name: (channels_last, mode of compilation)}; none where PyTorch cannot use the device."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed, and is left out.")
        return {}
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        print("PyTorch does not see the GPU, and is left out.")
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, as JAX's default
    # Every form compiles the same code again; above its usual 8, PyTorch would run the others eagerly.
    torch._dynamo.config.recompile_limit = 64
    forms = {
        "eager": (False, None),
        "eager, channels_last": (True, None),
        "compiled": (False, "default"),
        "compiled, channels_last": (True, "default"),
    }
    if on_gpu:  # CUDA graphs
        forms["compiled for low overhead"] = (False, "reduce-overhead")
    return forms


def product_peers(precisions: list) -> list[Peer]:
    """The device's own limit: large square matrix products, operands in each precision and sums in float32."""
    size = 8192 if jax.default_backend() == "gpu" else 2048

    def make(precision):
        key = jax.random.key(0)
        a, b = jax.random.normal(key, (2, size, size)).astype(precision)
        multiply = jax.jit(jnp.matmul)
        return lambda: jax.block_until_ready(multiply(a, b))

    return [
        Peer(f"matrix product, {precision}", "limit", make(precision), 2 * size**3)
        for precision in precisions
    ]


def operations(model: str, train: bool) -> float:
    """Additions and multiplications an image, of the layers' products alone.

    The backward pass takes two products of the forward one's size, but for the first layer, which needs no gradient in
    the image.
    """
    network = MODELS[model][0](IMAGE_SHAPE)
    variables = jax.eval_shape(
        network.init, jax.random.key(0), jnp.zeros((1, *IMAGE_SHAPE))
    )
    forward = {
        path[-2].key: 2 * leaf.size * PLACES[model][path[-2].key]
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
        if path[-1].key == "kernel"
    }
    total = sum(forward.values())
    return 3 * total - forward["conv1"] if train else total


def measure(peers: list[Peer], rounds: int) -> list[list[float]]:
    """The rates of each peer, work a second, after two runs that compile and warm up."""
    rates = [[] for _ in peers]
    for peer in peers:
        peer.run()
        peer.run()
    for _ in range(rounds):
        for peer, own in zip(peers, rates):
            start = time.perf_counter()
            peer.run()
            own.append(peer.work / (time.perf_counter() - start))
    return rates


def spread(values: np.ndarray) -> dict[str, float]:
    return {
        "median": float(np.median(values)),
        "lowest": float(values.min()),
        "highest": float(values.max()),
    }


def compare(peers, rates) -> list[dict]:
    """A row for each peer: its rate, how many times as fast ours is, and its share of the product's rate."""
    by_name = {(p.group, p.name): np.array(own) for p, own in zip(peers, rates)}
    rows = []
    for (group, name), own in by_name.items():
        row = {"group": group, "name": name} | spread(own)
        if name != "limit":
            model, kind, precision = group.split(", ")
            limit = by_name[f"matrix product, {precision}", "limit"]
            work = operations(model, kind == "training")
            row["ours is"] = float(np.median(by_name[group, "ours"] / own))
            row["share of the limit"] = float(np.median(own * work / limit))
        rows.append(row)
    return rows


def show(rows: list[dict]) -> None:
    group = None
    for row in rows:
        if row["name"] == "limit":
            rate = f"{row['median'] / 1e9:,.0f} GFLOP/s ({row['lowest'] / 1e9:,.0f} to {row['highest'] / 1e9:,.0f})"
            print(f"{row['group']}: {rate}")
            continue
        if row["group"] != group:
            group = row["group"]
            print(
                f"\n{group + ', images/s':36} {'median':>9} {'lowest':>9} {'highest':>9} {'ours is':>8} {'of limit':>8}"
            )
        print(
            f"{row['name']:36} {row['median']:9,.0f} {row['lowest']:9,.0f} {row['highest']:9,.0f} "
            f"{row['ours is']:7.2f}x {row['share of the limit']:8.1%}"
        )


def verdict(rows: list[dict]) -> str:
    """One line: how many times as fast ours trains."""
    sentences = []
    for group in dict.fromkeys(
        row["group"] for row in rows if "training" in row["group"]
    ):
        ratios = {row["name"]: row["ours is"] for row in rows if row["group"] == group}
        against = []
        if "plain Flax" in ratios:
            against.append(f"{ratios['plain Flax']:.1f} times plain Flax")
        torch_ratios = [value for name, value in ratios.items() if "PyTorch" in name]
        if torch_ratios:
            against.append(f"{min(torch_ratios):.2f} times PyTorch's best")
        if against:
            sentences.append(f"{group}: ours is {' and '.join(against)}")
    return "; ".join(sentences)


def draw(rows: list[dict], title: str) -> Figure:
    """Bars of the medians, a panel for each group."""
    groups = list(dict.fromkeys(row["group"] for row in rows if row["name"] != "limit"))
    columns = 2
    figure = Figure(
        figsize=(13, 2.1 * -(-len(groups) // columns) + 1), layout="constrained"
    )
    for ax, group in zip(
        figure.subplots(-(-len(groups) // columns), columns, squeeze=False).flat, groups
    ):
        own = [row for row in rows if row["group"] == group][::-1]
        colors = ["#1b4f8a" if row["name"] == "ours" else "#b8c4d4" for row in own]
        bars = ax.barh(
            [row["name"] for row in own], [row["median"] for row in own], color=colors
        )
        ax.bar_label(bars, [f"{row['median']:,.0f}" for row in own], padding=3)
        ax.margins(x=0.16)
        ax.set(title=group, xticks=[])
        ax.spines[["top", "right", "bottom"]].set_visible(False)
    figure.suptitle(title)
    return figure


def sweep(
    rounds: int,
    out: str | None,
    batch_sizes: tuple = (32, 64, 128, 256, 512, 1024, 2048),
    widths: tuple = (1, 2, 4),
) -> None:
    """Time an image that ours trains, by batch size and width of the network."""
    images = max(batch_sizes)
    rng = np.random.default_rng(0)
    data = (
        rng.integers(0, 256, (images, *IMAGE_SHAPE), np.uint8),
        np.zeros(images, np.int32),
    )
    peers = []
    for width in widths:
        features = {
            "encoder_features": (32 * width, 64 * width),
            "decoder_features": (64 * width, 32 * width),
        }
        network = make_vae(IMAGE_SHAPE, **features)
        for batch_size in batch_sizes:
            steps = max(images // batch_size // width, 1)
            run = train_ours(network, vae_objective(network), *data, batch_size, steps)
            peers.append(Peer(f"{width}x", str(batch_size), run, batch_size * steps))
    table = []
    for peer, rate in zip(peers, measure(peers, rounds)):
        row = {"width": peer.group, "batch size": int(peer.name)}
        table.append(row | spread(1e6 / np.array(rate)))
    for width in dict.fromkeys(row["width"] for row in table):
        cells = [
            f"{row['batch size']}: {row['median']:.1f}"
            for row in table
            if row["width"] == width
        ]
        print(f"width {width}, us an image by batch size:", ", ".join(cells))
    title = f"Training the VAE: {device_name()}; median and range of {rounds} rounds"
    write(out, {"machine": machine(), "rows": table}, draw_sweep(table, title))


def draw_sweep(rows: list[dict], title: str) -> Figure:
    """Microseconds an image by batch size, a line for each width of the network."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    ax = figure.subplots()
    for width in dict.fromkeys(row["width"] for row in rows):
        batch_sizes, median, lowest, highest = np.array(
            [
                [row[name] for name in ("batch size", "median", "lowest", "highest")]
                for row in rows
                if row["width"] == width
            ]
        ).T
        (line,) = ax.loglog(batch_sizes, median, "o-", label=f"{width} as wide")
        ax.fill_between(
            batch_sizes,
            lowest,
            highest,
            color=line.get_color(),
            alpha=0.15,
            linewidth=0,
        )
    ax.set(xlabel="batch size", ylabel="microseconds an image", title=title)
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
    libraries = ("jax", "jaxlib", "flax", "optax", "torch")
    versions = [
        f"{name} {importlib.metadata.version(name)}"
        for name in libraries
        if importlib.util.find_spec(name)
    ]
    return ", ".join([device_name(), f"Python {platform.python_version()}", *versions])


def write(out: str | None, table: dict, figure: Figure) -> None:
    if out:
        write_whole(Path(f"{out}.json"), json.dumps(table, indent=1) + "\n")
        save_figure(figure, Path(f"{out}.png"))


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    print(machine())
    if _SWEEP.value:
        for flag in (_MODEL, _PRECISION, _BATCH_SIZE, _STEPS):
            if flag.present:
                raise app.UsageError(f"--{flag.name} has no meaning with --sweep")
        return sweep(_ROUNDS.value, _OUT.value)
    batch_size, steps = _BATCH_SIZE.value, _STEPS.value
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size * steps, *IMAGE_SHAPE), np.uint8)
    labels = rng.integers(0, 10, len(images), np.int32)
    precisions = PRECISIONS if _PRECISION.value == "both" else [_PRECISION.value]
    peers = product_peers(precisions)
    for model in MODELS if _MODEL.value == "both" else [_MODEL.value]:
        peers += make_peers(model, precisions, (images, labels), batch_size, steps)
    print(f"batch {batch_size}, {_ROUNDS.value} rounds of {steps} steps, interleaved")
    rows = compare(peers, measure(peers, _ROUNDS.value))
    show(rows)
    title = f"Images a second: {device_name()}, batch {batch_size}"
    write(_OUT.value, {"machine": machine(), "rows": rows}, draw(rows, title))
    print(f"\n{verdict(rows)}")


if __name__ == "__main__":
    app.run(main)
