"""The training loop: run a chunk, log, evaluate, draw. It does not know which model it trains."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from vae_jax.data import Dataset, epoch_order
from vae_jax.evaluate import make_evaluate, mean_metrics
from vae_jax.objectives import make_batch
from vae_jax.rundir import Progress, RunDirectory
from vae_jax.steps import TrainState, init_state, make_train_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes about it; nothing here changes its numbers.

    Attributes:
        chunk: training steps in one call of the compiled program, and in one row of metrics.jsonl.
        figures_every: epochs between two drawings of the figures; they are drawn after the first and last epoch too.
        tensorboard: also write the metrics for TensorBoard.
        compilation_cache: keep compiled programs in a folder of the user's, so that the next start is faster.
    """

    chunk: int = 20
    figures_every: int = 10
    tensorboard: bool = False
    compilation_cache: bool = True

    def __post_init__(self):
        for name in ("chunk", "figures_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"run.{name} is {getattr(self, name)}, but must be at least 1"
                )


class Job(NamedTuple):
    """All that the loop needs, made by build.py."""

    title: str
    seed: int
    epochs: int
    batch_size: int
    dataset: Dataset
    init: Callable  # key -> variables
    objective: Callable
    optimizer: optax.GradientTransformation
    report: Callable  # (variables, {split: per-example arrays}, history) -> ({name: Figure}, {name: number})
    run: RunOptions

    @property
    def steps_per_epoch(self) -> int:
        """Training batches are full: what is left over differs from epoch to epoch."""
        return len(self.dataset.splits["train"].label) // self.batch_size


def make_run_chunk(train_step: Callable, batch_size: int, chunk: int) -> Callable:
    """`run_chunk(state, order, first, count, image, label) -> (state, {name: [chunk] array})`, jitted.

    Runs the steps `first` to `first + count - 1` of the epoch whose examples are in `order`; `count`, at most `chunk`,
    is no part of the compiled program. The state given is donated.
    """

    @functools.partial(jax.jit, donate_argnums=0)
    def run_chunk(state, order, first, count, image, label):
        weight = jnp.ones(batch_size)

        def one_step(i, carry):
            state, history = carry
            rows = lax.dynamic_slice(order, ((first + i) * batch_size,), (batch_size,))
            state, metrics = train_step(
                state, make_batch(image[rows], label[rows], weight, rows)
            )
            return state, {
                name: history[name].at[i].set(value) for name, value in metrics.items()
            }

        batch = make_batch(
            image[:batch_size], label[:batch_size], weight, order[:batch_size]
        )
        shapes = jax.eval_shape(lambda: train_step(state, batch)[1])
        history = {
            name: jnp.zeros(chunk, shape.dtype) for name, shape in shapes.items()
        }
        return lax.fori_loop(0, count, one_step, (state, history))

    return run_chunk


def train(
    job: Job, directory: RunDirectory, progress: Progress
) -> tuple[TrainState, dict[str, float | int]]:
    """Train to the end. Returns the last state and the final numbers.

    Raises FloatingPointError, with the step and the metric's name, when a metric is not finite.
    """
    dataset, batch_size, chunk = job.dataset, job.batch_size, job.run.chunk
    size = len(dataset.splits["train"].label)
    steps_per_epoch = job.steps_per_epoch

    root = jax.random.key(job.seed)  # given away with the state: state.key from here on
    state = init_state(jax.jit(job.init)(root), job.optimizer, root)
    run_chunk = make_run_chunk(
        make_train_step(job.objective, job.optimizer), batch_size, chunk
    )
    image, label = jax.device_put(dataset.splits["train"])
    evaluations = {
        name: make_evaluate(job.objective, split)
        for name, split in dataset.splits.items()
        if name != "train"
    }

    def log(step, metrics):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}: try a lower optimizer.learning_rate"
                )
        directory.log({"step": step, "epoch": step / steps_per_epoch, **metrics})

    def read(end, count, history):
        """Bring a chunk's metrics to the host; this waits until the device has come so far."""
        history = {
            f"train/{name}": np.asarray(values[:count])
            for name, values in jax.device_get(history).items()
        }
        finite = np.logical_and.reduce(
            [np.isfinite(values) for values in history.values()]
        )
        if not finite.all():  # name the first bad step, not the mean over the chunk
            bad = int(np.argmin(finite))
            log(
                end - count + bad + 1,
                {name: float(values[bad]) for name, values in history.items()},
            )
        means = mean_metrics(history)
        log(end, means)
        progress.update(
            count * batch_size, (end - 1) // steps_per_epoch + 1, means["train/loss"]
        )
        epoch_means.append((means, count))

    unread = None
    for epoch in range(1, job.epochs + 1):
        order = jax.device_put(epoch_order(job.seed, epoch, size, dataset.shuffle))
        epoch_means = []
        for first in range(0, steps_per_epoch, chunk):
            count = min(chunk, steps_per_epoch - first)
            state, history = run_chunk(state, order, first, count, image, label)
            if unread:  # a chunk late, while the device is busy with the next one
                read(*unread)
            unread = ((epoch - 1) * steps_per_epoch + first + count, count, history)
        read(*unread)
        unread = None
        trained = {
            name: float(
                np.average(
                    [means[name] for means, _ in epoch_means],
                    weights=[count for _, count in epoch_means],
                )
            )
            for name in epoch_means[0][0]
        }

        arrays = {
            name: evaluate(state.variables, state.key)
            for name, evaluate in evaluations.items()
        }
        tested = {
            f"{split}/{name}": value
            for split, values in arrays.items()
            for name, value in mean_metrics(values).items()
        }
        log(epoch * steps_per_epoch, tested)
        progress.epoch_done(epoch, trained | tested)
        if epoch in (1, job.epochs) or epoch % job.run.figures_every == 0:
            figures, numbers = job.report(state.variables, arrays, directory.history)
            directory.save_figures(figures)
    return state, {
        "epochs": job.epochs,
        "steps": job.epochs * steps_per_epoch,
        **trained,
        **tested,
        **numbers,
    }
