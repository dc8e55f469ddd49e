"""Images trained per second: ours, the same model in plain Flax, PyTorch's best. One interleaved run on this machine.

    python -m experiments.speed [--model=both] [--batch_size=128] [--steps=20] [--rounds=9]

Every peer trains the post's VAE, or its classifier, by Adam on the same batches of uint8 images held in memory. Each
round times every peer once, so that ratios hold where the machine's speed drifts; reported is the median over rounds
with the lowest and highest. PyTorch is a peer where it is installed.
"""

import functools
import importlib.metadata
import importlib.util
import os
import platform
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

from vae_jax.models import make_classifier, make_vae
from vae_jax.objectives import cross_entropy, elbo, make_batch
from vae_jax.steps import init_state, jit_train_step, make_train_step
from vae_jax.train import make_run_chunk

_MODEL = flags.DEFINE_enum("model", "both", ["vae", "classifier", "both"], "Which.")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
    "steps", 20, "Steps a peer takes in one round.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer("rounds", 9, "Timed rounds.", lower_bound=1)
IMAGE_SHAPE = (28, 28, 1)


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


def ours(network, objective, images, labels, batch_size, steps):
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


def plain_flax(network, objective, images, labels, batch_size, steps):
    """The same model in Flax's layers, with a jitted step."""
    optimizer = optax.adam(1e-3)
    state = initial_state(network, optimizer)
    step = jit_train_step(objective, optimizer)
    images, labels = jax.device_put((images, labels))
    batch = jax.jit(
        lambda images, labels, rows: make_batch(
            images[rows], labels[rows], jnp.ones(batch_size), rows
        )
    )

    def run():
        nonlocal state
        for i in range(steps):
            rows = jnp.arange(i * batch_size, (i + 1) * batch_size)
            state, _ = step(state, batch(images, labels, rows))
        jax.block_until_ready(state)

    return run


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


def pytorch(network, images, labels, batch_size, steps, channels_last, compiled):
    """The same model in PyTorch, with fused Adam."""
    import torch

    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = network.to(memory_format=layout)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    loss = torch.compile(network) if compiled else network
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    labels = torch.from_numpy(labels).long()

    def run():
        for i in range(steps):
            rows = slice(i * batch_size, (i + 1) * batch_size)
            image = (images[rows].float() / 255).contiguous(memory_format=layout)
            optimizer.zero_grad(set_to_none=True)
            loss(image, labels[rows]).backward()
            optimizer.step()

    return run


# Ours, in Flax's layers, the objective of both, in PyTorch.
MODELS = {
    "vae": (make_vae(IMAGE_SHAPE), PlainVAE(), vae_objective, torch_vae),
    "classifier": (
        make_classifier(IMAGE_SHAPE, 10),
        PlainClassifier(),
        classifier_objective,
        torch_classifier,
    ),
}


def make_peers(model, *load):
    network, plain, make_objective, make_torch = MODELS[model]
    peers = {
        "ours": ours(network, make_objective(network), *load),
        "plain Flax": plain_flax(plain, make_objective(plain), *load),
    }
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed, and is left out.")
        return peers
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for channels_last in (False, True):
        for compiled in (False, True):
            name = f"PyTorch {'compiled' if compiled else 'eager'}{', channels_last' if channels_last else ''}"
            peers[name] = pytorch(make_torch(), *load, channels_last, compiled)
    return peers


def measure(peers, rounds, images):
    """The rates of each peer, images a second, after two runs that compile and warm up."""
    rates = {name: [] for name in peers}
    for run in peers.values():
        run()
        run()
    for _ in range(rounds):
        for name, run in peers.items():
            start = time.perf_counter()
            run()
            rates[name].append(images / (time.perf_counter() - start))
    return rates


def report(model, rates):
    heading = f"{model}, images/s"
    print(f"\n{heading:32} {'median':>7} {'lowest':>7} {'highest':>7} {'ours is':>9}")
    ratios = {name: np.median(np.divide(rates["ours"], rates[name])) for name in rates}
    for name, values in rates.items():
        print(
            f"{name:32} {np.median(values):7.0f} {min(values):7.0f} {max(values):7.0f} {ratios[name]:8.2f}x"
        )
    best = min(
        (name for name in rates if name.startswith("PyTorch")),
        key=ratios.get,
        default=None,
    )
    versus = f" and {ratios[best]:.2f} times PyTorch's best ({best})" if best else ""
    print(f"ours is {ratios['plain Flax']:.1f} times plain Flax{versus}")


def main(argv):
    logging.set_verbosity(logging.WARNING)
    jax.config.update("jax_platforms", "cpu")  # as PyTorch here
    batch_size, steps, rounds = _BATCH_SIZE.value, _STEPS.value, _ROUNDS.value
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (batch_size * steps, *IMAGE_SHAPE), np.uint8)
    labels = rng.integers(0, 10, len(images), np.int32)
    libraries = ("jax", "jaxlib", "flax", "optax", "torch")
    versions = ", ".join(
        f"{name} {importlib.metadata.version(name)}"
        for name in libraries
        if importlib.util.find_spec(name)
    )
    print(
        f"Training, batch {batch_size}, {rounds} rounds of {steps} steps, interleaved"
    )
    print(
        f"{len(os.sched_getaffinity(0))} CPU cores, {jax.devices()[0].device_kind}, Python {platform.python_version()}, {versions}"
    )
    for model in MODELS if _MODEL.value == "both" else [_MODEL.value]:
        peers = make_peers(model, images, labels, batch_size, steps)
        report(model, measure(peers, rounds, len(images)))


if __name__ == "__main__":
    app.run(main)
