"""What a training step costs under each likelihood, prior and bound, relative to the default VAE's.

    python -m experiments.costs [--rounds=15] [--steps=10]

All are compiled first, then timed in turn, round by round, in one process; a ratio is the median of the rounds' ratios.
Images are random, 28x28; the batch size is 128.
"""

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from experiments import launch
from experiments.speed import Peer, machine, measure
from vae_jax.families import vae
from vae_jax.optimizers import make_adam
from vae_jax.run.report import markdown_table
from vae_jax.steps import init_state, make_run_steps, make_train_step

BATCH = 128
CASES = {  # (fields of model, fields of objective)
    "default": ({}, {}),
    "gaussian, learned": ({"likelihood": "gaussian", "learn_scale": True}, {}),
    "optimal_gaussian": ({"likelihood": "optimal_gaussian"}, {}),
    "laplace": ({"likelihood": "laplace"}, {}),
    "bernoulli": ({"likelihood": "bernoulli"}, {}),
    "continuous_bernoulli": ({"likelihood": "continuous_bernoulli"}, {}),
    "discretised_logistic": ({"likelihood": "discretised_logistic"}, {}),
    "mixture of 100": ({"prior": "mixture"}, {}),
    "vamp of 100": ({"prior": "vamp"}, {}),
    "5 samples": ({}, {"samples": 5}),
    "5 samples, dreg": ({}, {"samples": 5, "estimator": "dreg"}),
    "50 samples": ({}, {"samples": 50}),
}


def make_run(model_fields: dict, objective_fields: dict, steps: int):
    """A function that trains `steps` steps and waits for them."""
    model, optimizer = vae.make((28, 28, 1), **model_fields), make_adam(1000)
    train_step = make_train_step(vae.make_objective(model, **objective_fields), optimizer)
    run_steps = jax.jit(make_run_steps(train_step, BATCH, steps))
    state = init_state(model.init(jax.random.key(0)), optimizer, jax.random.key(1))
    image = jnp.asarray(np.random.default_rng(0).integers(0, 256, (steps * BATCH, 28, 28, 1), np.uint8))
    order, label = jnp.arange(steps * BATCH), jnp.zeros(steps * BATCH, jnp.int32)
    return lambda: jax.block_until_ready(run_steps(state, order, 0, steps, image, label))


def main() -> None:
    given = flags.FLAGS
    peers = []
    for name, fields in CASES.items():
        steps = max(1, given.steps // fields[1].get("samples", 1))
        peers.append(Peer("step", name, make_run(*fields, steps), steps))
    rates = measure(peers, given.rounds)
    cells = [["a training step with", "times the default's", "lowest round", "highest round"]]
    for peer, own in zip(peers, rates):
        ratios = rates[0] / own
        cells.append([peer.name, *(f"{value:.2f}" for value in (np.median(ratios), ratios.min(), ratios.max()))])
    print(f"{markdown_table(cells)}\n\n{machine()}; {given.rounds} rounds")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 15, "Rounds.", lower_bound=1)
    flags.DEFINE_integer("steps", 10, "Training steps in a round; fewer with several samples.", lower_bound=1)
    launch.start("costs", main)
