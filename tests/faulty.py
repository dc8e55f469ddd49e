"""The program with a fault put into it: `python tests/faulty.py FAULT STEP FLAG...`; what tests/test_robustness.py starts."""

import sys
import time

import jax
import jax.experimental
import jax.numpy as jnp
import numpy as np
from absl import app

from vae_jax import main
from vae_jax.run import checkpoint, devices, directory, loop


def without_optimizer(step):
    """A broken restore: the optimizer's state begins anew."""
    restore = checkpoint.Checkpoints.restore

    def broken(*arguments):
        state = restore(*arguments)
        return state.replace(opt_state=jax.tree.map(jnp.zeros_like, state.opt_state))

    checkpoint.Checkpoints.restore = broken


def raises(step):
    """An exception that nobody expects, in the middle of the loop."""
    log = directory.RunDirectory.log

    def broken(directory, row):
        if row["step"] == step:
            raise RuntimeError("put in by faulty.py")
        log(directory, row)

    directory.RunDirectory.log = broken


def slow(step):
    """A compiled program that does not come back for a while, and says so."""
    make = loop.make_train_step

    def wait(now):
        if now + 1 == step:
            print("waiting", flush=True)
            time.sleep(30)
        return np.float32(0)

    def make_slow(*arguments, **options):
        train_step = make(*arguments, **options)

        def slowed(state, batch):
            shape = jax.ShapeDtypeStruct((), np.float32)
            nothing = jax.experimental.io_callback(wait, shape, state.step)
            state, metrics = train_step(state, batch)
            loss = metrics["loss"]
            return state, metrics | {"loss": loss._replace(total=loss.total + nothing)}

        return slowed

    loop.make_train_step = make_slow


def not_a_number(step, name):
    """A step that ends with NaN: in the metric `name`, or in the parameters alone. Chunks are of one step.

    The NaN comes from outside: another compiled program may round otherwise in the steps before.
    """
    compile_ = devices.Devices.compile

    def compile_broken(devices, function, donate=False):
        call = compile_(devices, function, donate)

        def broken(*arguments):
            state, history = call(*arguments)
            if state.step != step:
                return state, history
            if name == "params":
                weights = state.params, state.average
                params, average = jax.tree.map(lambda leaf: leaf * jnp.nan, weights)
                return state.replace(params=params, average=average), history
            return state, history | {
                name: jax.tree.map(lambda leaf: leaf * jnp.nan, history[name])
            }

        return broken if donate else call  # training alone gives its state away

    devices.Devices.compile = compile_broken


FAULTS = {
    "without_optimizer": without_optimizer,
    "raises": raises,
    "slow": slow,
    "loss": lambda step: not_a_number(step, "loss"),
    "grad_norm": lambda step: not_a_number(step, "grad_norm"),
    "params": lambda step: not_a_number(step, "params"),
}

if __name__ == "__main__":
    fault, step = sys.argv[1:3]
    FAULTS[fault](int(step))
    app.run(main.main, [sys.argv[0], *sys.argv[3:]], flags_parser=main.parse_flags)
