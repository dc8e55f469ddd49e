"""The implementations that experiments/speed.py compares; each becomes a function that does one timed run.

All of them train the post's models with Adam, or evaluate their loss, on uint8 images held in the device's memory; our
evaluation sends its images anew each time, as the program does.
"""

import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vae_jax.batch import Split, make_batch
from vae_jax.families import Model, classifier, vae
from vae_jax.likelihoods import unit_gaussian
from vae_jax.objectives import Objective
from vae_jax.priors import standard_normal
from vae_jax.run.devices import Devices
from vae_jax.run.evaluate import map_examples
from vae_jax.steps import (
    TrainState,
    eval_metrics,
    init_state,
    jit_train_step,
    make_eval_step,
    make_run_steps,
    make_train_step,
)

IMAGE_SHAPE, CLASSES = (28, 28, 1), 10
MODELS = ("vae", "classifier")


class Work(NamedTuple):
    """What one run does: `steps` batches, read in order."""

    image: np.ndarray  # uint8
    label: np.ndarray
    batch_size: int
    steps: int

    @property
    def images(self) -> int:
        """Number of images that it reads."""
        return self.batch_size * self.steps


def random_work(batch_size: int, steps: int) -> Work:
    """Random images and labels; the time does not depend on them."""
    rng, count = np.random.default_rng(0), batch_size * steps
    image = rng.integers(0, 256, (count, *IMAGE_SHAPE), np.uint8)
    return Work(image, rng.integers(0, CLASSES, count, np.int32), batch_size, steps)


class Implementation(NamedTuple):
    """A model for training: its initial variables, and its loss."""

    init: Callable  # key -> variables
    objective: Objective

    def state(self, optimizer: optax.GradientTransformation) -> TrainState:
        """The state before the first step."""
        variables = jax.jit(self.init)(jax.random.key(0))
        return init_state(variables, optimizer, jax.random.key(1))


def ours(name: str, **fields) -> Implementation:
    """This package's model; `fields` are those of the config's section `model`."""
    if name == "vae":
        return _implementation(name, vae.make(IMAGE_SHAPE, **fields))
    return _implementation(name, classifier.make(IMAGE_SHAPE, CLASSES, **fields))


def plain_flax(name: str) -> Implementation:
    """The same model built from Flax's own layers."""
    network = PlainVAE() if name == "vae" else PlainClassifier()
    model = Model(lambda key: network.init(key, jnp.zeros((1, *IMAGE_SHAPE))))
    if name == "vae":
        model = model._replace(
            encode=functools.partial(network.apply, method="encode"),
            decode_raw=functools.partial(network.apply, method="decode"),
            likelihood=unit_gaussian(),
            prior=standard_normal(20),
        )
    else:
        apply = functools.partial(network.apply, mutable=["batch_stats"])
        model = model._replace(apply=apply)
    return _implementation(name, model)


def _implementation(name, model):
    if name == "vae":
        return Implementation(model.init, vae.make_objective(model))
    return Implementation(model.init, classifier.make_objective(model, IMAGE_SHAPE))


class PlainVAE(nn.Module):
    def setup(self):
        fields = {"padding": "SAME", "kernel_init": nn.initializers.glorot_uniform()}
        self.conv1 = nn.Conv(32, (3, 3), (2, 2), **fields)
        self.conv2 = nn.Conv(64, (3, 3), (2, 2), **fields)
        self.fc = nn.Dense(40, kernel_init=fields["kernel_init"])
        self.tconv1 = nn.ConvTranspose(64, (7, 7), (7, 7), **fields)
        self.tconv2 = nn.ConvTranspose(64, (3, 3), (2, 2), **fields)
        self.tconv3 = nn.ConvTranspose(32, (3, 3), (2, 2), **fields)
        self.tconv4 = nn.ConvTranspose(1, (3, 3), (1, 1), **fields)

    def encode(self, image):
        x = nn.relu(self.conv2(nn.relu(self.conv1(image))))
        return jnp.split(self.fc(x.reshape(x.shape[0], -1)), 2, axis=-1)

    def decode(self, z):
        x = nn.relu(self.tconv1(z.reshape(-1, 1, 1, z.shape[-1])))
        x = self.tconv4(nn.relu(self.tconv3(nn.relu(self.tconv2(x)))))
        return x.reshape(*z.shape[:-1], *IMAGE_SHAPE)

    def __call__(self, image):
        return self.decode(self.encode(image)[0])


class PlainClassifier(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, axis_name=None):
        for i, features in enumerate((8, 16, 32)):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(nn.BatchNorm(not train, axis_name=axis_name, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if i < 2 else x
        return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


def train_in_loop(implementation: Implementation, work: Work) -> Callable[[], None]:
    """Train as this package does: all steps in one program."""
    optimizer = optax.adam(1e-3)
    state = implementation.state(optimizer)
    train_step = make_train_step(implementation.objective, optimizer)
    run_steps = make_run_steps(train_step, work.batch_size, work.steps)
    run_steps = Devices(1).compile(run_steps, training=True)
    order = np.arange(len(work.image), dtype=np.int32)
    order, image, label = jax.device_put((order, work.image, work.label))

    def run():
        nonlocal state
        state, _ = run_steps(state, order, 0, work.steps, image, label)
        jax.block_until_ready(state)

    return run


def evaluate_split(implementation: Implementation, work: Work, precision: str | None = None) -> Callable[[], None]:
    """Evaluate as this package does: all batches in one program, arrays copied to the host."""
    state = implementation.state(optax.adam(1e-3))
    split = Split(work.image, work.label)
    metrics = functools.partial(eval_metrics, implementation.objective)
    evaluate = map_examples(metrics, split, batch_size=work.batch_size, devices=Devices(1, precision))
    return lambda: evaluate(state.variables, state.key)


def train_by_steps(implementation: Implementation, work: Work) -> Callable[[], None]:
    """Train by a jitted step called from Python."""
    optimizer = optax.adam(1e-3)
    state = implementation.state(optimizer)
    step = jit_train_step(implementation.objective, optimizer)
    batch = _make_batches(work)

    def run():
        nonlocal state
        for i in range(work.steps):
            state, _ = step(state, batch(i))
        jax.block_until_ready(state)

    return run


def evaluate_by_steps(implementation: Implementation, work: Work) -> Callable[[], None]:
    """Evaluate by a jitted step called from Python."""
    state = implementation.state(optax.adam(1e-3))
    step = jax.jit(make_eval_step(implementation.objective))
    batch = _make_batches(work)
    return lambda: jax.device_get([step(state.variables, batch(i), state.key)["loss"] for i in range(work.steps)])


def _make_batches(work):
    """`batch(i)` returns batch i of data on the device."""
    data = jax.device_put((work.image, work.label))
    weight = jnp.ones(work.batch_size)
    take = jax.jit(lambda image, label, rows: make_batch(image[rows], label[rows], weight, rows))
    return lambda i: take(*data, i * work.batch_size + jnp.arange(work.batch_size))


def torch_forms() -> dict[str, dict]:
    """{name: fields of `torch_run`}; empty where PyTorch is not installed or cannot use the device."""
    try:
        import torch
    except ImportError:
        print("PyTorch is not installed: left out")
        return {}
    on_gpu = jax.default_backend() == "gpu"
    if on_gpu and not torch.cuda.is_available():
        print("PyTorch does not see the GPU: left out")
        return {}
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.set_float32_matmul_precision("high")  # TF32 on GPUs, JAX's default
    # Each form recompiles the same code; beyond 8 recompilations PyTorch would run eagerly.
    torch._dynamo.config.recompile_limit = 64
    forms = {
        "eager": {},
        "eager, channels_last": {"channels_last": True},
        "compiled": {"mode": "default"},
        "compiled, channels_last": {"channels_last": True, "mode": "default"},
    }
    if on_gpu:  # CUDA graphs
        forms["compiled for low overhead"] = {"mode": "reduce-overhead"}
    return forms


def torch_run(
    model: str, work: Work, precision: str, train: bool, channels_last: bool = False, mode: str | None = None
) -> Callable[[], None]:
    """Train by fused Adam, or evaluate, in PyTorch; compiled with `mode` if given."""
    import torch

    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    layout = torch.channels_last if channels_last else torch.contiguous_format
    network = (torch_vae if model == "vae" else torch_classifier)()
    network = network.to(device, memory_format=layout).train(train)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
    loss = torch.compile(network, mode=mode) if mode else network
    images = torch.from_numpy(work.image).permute(0, 3, 1, 2).to(device)
    labels = torch.from_numpy(work.label).long().to(device)
    autocast = torch.autocast(device, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=train)

    def run():
        total = 0.0
        for i in range(work.steps):
            rows = slice(i * work.batch_size, (i + 1) * work.batch_size)
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


def torch_vae():
    """The VAE in PyTorch: (images, labels) -> loss."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    class TorchVAE(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(1, 32, 3, 2, 1)
            self.conv2 = nn.Conv2d(32, 64, 3, 2, 1)
            self.fc = nn.Linear(3136, 40)
            # Faster than ConvTranspose2d on a 1x1 map; ours does the same.
            self.tconv1 = nn.Linear(20, 3136, bias=False)
            self.tconv1_bias = nn.Parameter(torch.zeros(64, 1, 1))
            self.tconv2 = nn.ConvTranspose2d(64, 64, 3, 2, 1, 1)
            self.tconv3 = nn.ConvTranspose2d(64, 32, 3, 2, 1, 1)
            self.tconv4 = nn.ConvTranspose2d(32, 1, 3, 1, 1)

        def forward(self, image, label):
            x = F.relu(self.conv2(F.relu(self.conv1(image))))
            mean, logvar = self.fc(x.flatten(1)).chunk(2, dim=1)
            z = mean + torch.exp(logvar / 2) * torch.randn_like(mean)
            x = F.relu(self.tconv1(z).view(-1, 64, 7, 7) + self.tconv1_bias)
            x = F.relu(self.tconv3(F.relu(self.tconv2(x))))
            error = (image - torch.sigmoid(self.tconv4(x))) ** 2
            kl = -0.5 * (1 + logvar - mean**2 - torch.exp(logvar)).sum()
            return (0.5 * error.sum() + kl) / len(image)

    return TorchVAE()


def torch_classifier():
    """The classifier in PyTorch: (images, labels) -> loss."""
    from torch import nn
    from torch.nn import functional as F

    class TorchClassifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.Sequential()
            for c_in, c_out in [(1, 8), (8, 16), (16, 32)]:
                self.layers.append(nn.Conv2d(c_in, c_out, 3, padding=1))
                self.layers.append(nn.BatchNorm2d(c_out))
                self.layers.append(nn.ReLU())
                if c_out < 32:
                    self.layers.append(nn.MaxPool2d(2))
            self.layers.extend([nn.Flatten(), nn.Linear(7 * 7 * 32, CLASSES)])

        def forward(self, image, label):
            return F.cross_entropy(self.layers(image), label)

    return TorchClassifier()
