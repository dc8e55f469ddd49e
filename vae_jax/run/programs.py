"""The compiled programs of a training."""

from collections.abc import Callable
from typing import NamedTuple

import jax

from vae_jax.run.devices import Devices
from vae_jax.run.job import Job
from vae_jax.steps import init_state, make_run_steps, make_train_step


class Programs(NamedTuple):
    """The compiled programs of a job on some devices.

    Attributes:
        make_state: root key -> the initial state.
        run_steps: the result of `steps.make_run_steps`.
        evaluations: for each split that is not trained on, the result of `evaluate.make_evaluate`.
    """

    make_state: Callable
    run_steps: Callable
    evaluations: dict[str, Callable]


def make_programs(job: Job, devices: Devices) -> Programs:
    """Make the programs of a job; each is compiled at its first call."""

    def make_state(root):
        return init_state(job.init(root), job.optimizer, root, job.ema_decay)

    train_step = make_train_step(
        *(job.objective, job.optimizer, devices.axis_name, job.ema_decay, job.prepare, job.groups)
    )
    run_steps = make_run_steps(train_step, job.batch_size, job.steps_per_call, devices.count)
    return Programs(
        jax.jit(job.map_seeds(make_state, 1)),
        devices.compile(job.map_seeds(run_steps, 2), training=True),
        {name: job.evaluate_on(name, devices) for name in job.dataset.splits if name != "train"},
    )
