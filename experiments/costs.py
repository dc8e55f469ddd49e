"""What a training step costs under each likelihood, prior, bound and family, relative to the default VAE's.

    python -m experiments.costs [--rounds=15] [--steps=10]

All are compiled first, then timed in turn, round by round, in one process; a ratio is the median of the rounds' ratios.
Images are those of scikit-learn's bundled digits, 28x28; the batch size is 128. The families have the post's networks, and of few
labels 16 of each batch are labelled.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags

from experiments import launch
from experiments.speed import Peer, machine, measure
from vae_jax.run import session
from vae_jax.run.config import make_config
from vae_jax.run.report import markdown_table
from vae_jax.steps import init_state, make_run_steps, make_train_step

BASE = {"data.name": "digits", "epochs": 1, "batch_size": 128, "best": "bound"}
FEW = {"data.labelled": 100, "data.labelled_per_batch": 16}
CASES = {  # name -> family, and the fields that differ from its defaults
    "default": ("vae", {}),
    "gaussian, learned": ("vae", {"model.likelihood": "gaussian", "model.learn_scale": True}),
    **{
        name: ("vae", {"model.likelihood": name})
        for name in ("optimal_gaussian", "laplace", "bernoulli", "continuous_bernoulli", "discretised_logistic")
    },
    "mixture of 100": ("vae", {"model.prior": "mixture"}),
    "vamp of 100": ("vae", {"model.prior": "vamp"}),
    "5 samples": ("vae", {"objective.samples": 5}),
    "5 samples, dreg": ("vae", {"objective.samples": 5, "objective.estimator": "dreg"}),
    "50 samples": ("vae", {"objective.samples": 50}),
    "conditional": ("conditional", {}),
    "sparse_labels, a bound": ("sparse_labels", FEW),
    "sparse_labels, as published": ("sparse_labels", FEW | {"objective.charge": False}),
    "semisupervised": ("semisupervised", FEW),
    "stacked": ("stacked", FEW),
    "vaegan": ("vaegan", {}),
}


def make_run(config: Mapping[str, Any], steps: int) -> Callable[[], None]:
    """A function that trains the job of a config for `steps` steps of its first epoch, and waits for them."""
    job = session.build(config)
    step = make_train_step(job.objective, job.optimizer, None, job.ema_decay, job.prepare, job.groups)
    run_steps = jax.jit(make_run_steps(step, job.batch_size, steps), donate_argnums=0)
    root = jax.random.key(0)
    state = jax.jit(lambda: init_state(job.init(root), job.optimizer, root, job.ema_decay))()
    order, image, label = jax.device_put((job.order(1), *job.dataset.splits["train"]))

    def run() -> None:
        nonlocal state
        state, _ = run_steps(state, order, 0, steps, image, label)
        jax.block_until_ready(state)

    return run


def main() -> None:
    given = flags.FLAGS
    peers = []
    for name, (family, fields) in CASES.items():
        steps = max(1, given.steps // fields.get("objective.samples", 1))
        config = make_config(family, BASE | fields, {"": {}}, "").to_dict()
        peers.append(Peer("step", name, make_run(config, steps), steps))
    rates = measure(peers, given.rounds)
    cells = [["a training step with", "times the default's", "lowest round", "highest round"]]
    for peer, own in zip(peers, rates):
        ratios = rates[0] / own
        cells.append([peer.name, *(f"{value:.2f}" for value in (np.median(ratios), ratios.min(), ratios.max()))])
    print(f"{markdown_table(cells)}\n\n{machine()}; {given.rounds} rounds")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 15, "Rounds.", lower_bound=1)
    flags.DEFINE_integer("steps", 10, "Training steps in a round, at most 11; fewer with several samples.", 1, 11)
    launch.start("costs", main)
