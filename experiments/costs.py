"""What a training step costs under each likelihood, prior, bound and family, relative to the default VAE's.

    python -m experiments.costs [--rounds=15] [--steps=10]

All are compiled first, then timed in turn, round by round, in one process; a ratio is the median of the rounds' ratios.
Images are those of scikit-learn's bundled digits, 28x28; the batch size is 128. The families have the post's networks.
With few labels, 16 images of each batch are labelled.
"""

from collections.abc import Callable

import jax
from absl import flags

from experiments import launch
from experiments.speed import Peer, machine, measure, median_and_range
from vae_jax.run import session
from vae_jax.run.config import make_config
from vae_jax.run.devices import Devices
from vae_jax.run.feed import resident
from vae_jax.run.job import Job, make_programs
from vae_jax.run.report import markdown_table

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


def make_run(job: Job, make_feed: Callable = resident, calls: int = 1) -> Callable[[], None]:
    """Make a function that runs `calls` calls of the compiled program like the loop: it reads metrics one call late."""
    devices = Devices(1)
    programs = make_programs(job, devices)
    feed, state, unread = make_feed(job, devices), programs.make_state(job.root()), None

    def run() -> None:
        nonlocal state, unread
        for call in range(calls):
            state, history = programs.run_steps(state, *feed(1, call * job.steps_per_call, job.steps_per_call))
            jax.device_get(unread)
            unread = history
        jax.block_until_ready(state)

    return run


def main() -> None:
    given = flags.FLAGS
    peers = []
    for name, (family, fields) in CASES.items():
        steps = max(1, given.steps // fields.get("objective.samples", 1))
        config = make_config(family, BASE | {"run.steps_per_call": steps} | fields, {"": {}}, "")
        peers.append(Peer("step", name, make_run(session.build(config.to_dict())), steps))
    rates = measure(peers, given.rounds)
    cells = [["a training step with", "times the default's", "lowest round", "highest round"]]
    for peer, own in zip(peers, rates):
        cells.append([peer.name, *(f"{value:.2f}" for value in median_and_range(rates[0] / own).values())])
    print(f"{markdown_table(cells)}\n\n{machine()}; {given.rounds} rounds")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 15, "Rounds.", lower_bound=1)
    flags.DEFINE_integer("steps", 10, "Training steps in a round, at most 11; fewer with several samples.", 1, 11)
    launch.start("costs", main)
