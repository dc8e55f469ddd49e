"""The program with a fault: `python tests/faulty.py FAULT STEP FLAG...`. tests/test_robustness.py starts it."""

import sys
import time
from pathlib import Path

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
import tensorflow_datasets as tfds
from absl import app
from small_mnist import url_infos

from vae_jax import main
from vae_jax.run import devices, directory, job


def raises(step):
    """An unexpected exception in the middle of the loop."""
    log = directory.RunDirectory.log

    def broken(directory, row):
        if row["step"] == step:
            raise RuntimeError("put in by faulty.py")
        log(directory, row)

    directory.RunDirectory.log = broken


def slow(step):
    """A compiled program that prints "waiting" and then takes half a minute."""
    make = job.make_train_step

    def wait(now):
        if now + 1 == step:
            print("waiting", flush=True)
            time.sleep(30)
        return np.float32(0)

    def make_slow(*arguments, **options):
        train_step = make(*arguments, **options)

        def slowed(state, batch):
            shape = jax.ShapeDtypeStruct((), np.float32)
            zero = jax.experimental.io_callback(wait, shape, state.step)
            state, metrics = train_step(state, batch)
            loss = metrics["loss"]
            return state, metrics | {"loss": loss._replace(total=loss.total + zero)}

        return slowed

    job.make_train_step = make_slow


def not_a_number(step, name):
    """A training call, of one step, that ends with NaN: in the metric `name`, or only in the weights.

    The NaN is put in outside the compiled program, because a changed program could round the earlier steps differently.
    """
    compile_ = devices.Devices.compile

    def multiply(tree):
        return jax.tree.map(lambda leaf: leaf * jnp.nan, tree)

    def compile_broken(devices, function, training=False):
        call = compile_(devices, function, training)

        def broken(*arguments):
            state, history = call(*arguments)
            if state.step != step:
                return state, history
            if name == "weights":
                return state.replace(params=multiply(state.params), ema=multiply(state.ema)), history
            return state, history | {name: multiply(history[name])}

        return broken if training else call

    devices.Devices.compile = compile_broken


def small_mnist_in(folder):
    """Not a fault: the files in a folder pass as MNIST's."""
    tfds.builder_cls("mnist").url_infos = url_infos(Path(folder))


FAULTS = {
    "small_mnist_in": small_mnist_in,
    "raises": raises,
    "slow": slow,
    "loss": lambda step: not_a_number(step, "loss"),
    "grad_norm": lambda step: not_a_number(step, "grad_norm"),
    "weights": lambda step: not_a_number(step, "weights"),
}

if __name__ == "__main__":
    fault, step = sys.argv[1:3]
    FAULTS[fault](int(step) if step.isdigit() else step)
    app.run(main.main, [sys.argv[0], *sys.argv[3:]], flags_parser=main.parse_flags)
