"""The training loop: restore, run a chunk, log, evaluate, draw, save. It does not know which model it trains.

Whatever belongs to a step is written before its checkpoint is, so that a run continues from a checkpoint as if it had
never stopped.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from vae_jax.batch import Dataset, make_batch
from vae_jax.data import epoch_order
from vae_jax.run.checkpoint import Checkpoints
from vae_jax.run.devices import Devices
from vae_jax.run.directory import RunDirectory
from vae_jax.run.evaluate import make_evaluate
from vae_jax.run.progress import Progress
from vae_jax.run.seeds import (
    combine_seeds,
    map_seeds,
    over_seeds,
    root_keys,
)
from vae_jax.steps import TrainState, init_state, make_train_step

PROFILED = range(1, 4)  # chunks since the start, the first of which compiles


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes about it; nothing here changes what is trained.

    Attributes:
        chunk: training steps in one call of the compiled program, and in one row of metrics.jsonl.
        save_every: training steps between two checkpoints; there is one at the end too, and at each best epoch.
        keep: how many of the latest checkpoints are kept, beside the best one.
        figures_every: epochs between two drawings of the figures; they are drawn after the first and last epoch too.
        tensorboard: also write the metrics for TensorBoard.
        profile: write a trace of three chunks into the run directory, for TensorBoard or Perfetto.
        compilation_cache: keep compiled programs in a folder of the user's, so that the next start is faster.
    """

    chunk: int = 20
    save_every: int = 500
    keep: int = 2
    figures_every: int = 10
    tensorboard: bool = False
    profile: bool = False
    compilation_cache: bool = True

    def __post_init__(self):
        for name in ("chunk", "save_every", "keep", "figures_every"):
            if getattr(self, name) < 1:
                raise ValueError(
                    f"run.{name} is {getattr(self, name)}, but must be at least 1"
                )


class Job(NamedTuple):
    """All that the loop needs, made by build.py."""

    title: str
    seed: int
    seeds: int  # trained together, from `seed` on
    epochs: int
    batch_size: int
    dataset: Dataset
    init: Callable  # key -> variables
    objective: Callable
    optimizer: optax.GradientTransformation
    average: float
    report: Callable  # (variables, {split: per-example arrays}, history) -> (() -> {name: Figure}, {name: number})
    metric: str  # of the validation images, which marks the best checkpoint
    about: dict  # what a checkpoint says of itself
    run: RunOptions

    @property
    def steps_per_epoch(self) -> int:
        """Training batches are full: what is left over differs from epoch to epoch."""
        return len(self.dataset.splits["train"].label) // self.batch_size

    @property
    def steps(self) -> int:
        return self.epochs * self.steps_per_epoch

    @property
    def best(self) -> str | None:
        """The metric that marks the best checkpoint."""
        held_out = "validation" in self.dataset.splits
        return f"validation/{self.metric}" if held_out else None

    def map_seeds(self, function: Callable, seeded: int) -> Callable:
        """`function` as it is for one seed; for several as `map_seeds` makes it."""
        return function if self.seeds == 1 else map_seeds(function, seeded)

    def root(self):
        """The root key; for several seeds one each, [seeds]."""
        if self.seeds == 1:
            return jax.random.key(self.seed)
        return root_keys(range(self.seed, self.seed + self.seeds))

    def reports(self, variables, arrays, history) -> tuple[Callable, dict]:
        """`report`; of several seeds the figures of the first, and the numbers of all as `over_seeds` gives them.

        A number that is the same for all, such as a yardstick, is given once.
        """
        if self.seeds == 1:
            return self.report(variables, arrays, history)
        reports = [
            self.report(
                *jax.tree.map(lambda leaf: leaf[i], (variables, arrays)),  # noqa: B023
                history,
            )
            for i in range(self.seeds)
        ]
        draw, first = reports[0]
        same = {
            name: value
            for name, value in first.items()
            if all(numbers[name] == value for _, numbers in reports)
        }
        differing = [
            {name: numbers[name] for name in first if name not in same}
            for _, numbers in reports
        ]
        return draw, same | combine_seeds(differing, self.seed)

    def order(self, epoch: int) -> np.ndarray:
        """The order of the training examples in an epoch, [size]; for several seeds [seeds, size]."""
        size, shuffle = len(self.dataset.splits["train"].label), self.dataset.shuffle
        orders = [
            epoch_order(seed, epoch, size, shuffle)
            for seed in range(self.seed, self.seed + self.seeds)
        ]
        return orders[0] if self.seeds == 1 else np.stack(orders)


def make_run_chunk(
    train_step: Callable, batch_size: int, chunk: int, shards: int = 1
) -> Callable:
    """`run_chunk(state, order, first, count, image, label, shard=0) -> (state, history)`, to be jitted.

    Runs the steps `first` to `first + count - 1` of the epoch whose examples are in `order`; `count`, at most `chunk`,
    may differ from call to call of one compiled program. Of each batch it takes the share `shard`, of `shards` equal
    ones, and `train_step` must add them up.
    """
    share = batch_size // shards
    train_step = jax.jit(train_step)  # so that it is traced once

    def run_chunk(state, order, first, count, image, label, shard=0):
        weight = jnp.ones(share)

        def one_step(i, carry):
            state, history = carry
            start = (first + i) * batch_size + shard * share
            rows = lax.dynamic_slice(order, (start,), (share,))
            state, metrics = train_step(
                state, make_batch(image[rows], label[rows], weight, rows)
            )
            return state, jax.tree.map(
                lambda values, value: values.at[i].set(value), history, metrics
            )

        batch = make_batch(image[:share], label[:share], weight, order[:share])
        shapes = jax.eval_shape(lambda: train_step(state, batch)[1])
        history = jax.tree.map(lambda leaf: jnp.zeros(chunk, leaf.dtype), shapes)
        return lax.fori_loop(0, count, one_step, (state, history))

    return run_chunk


def train(
    job: Job,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    devices: Devices | None = None,
) -> TrainState:
    """Train to the end, from the latest checkpoint where there is one. Returns the last state, on the devices.

    It takes one device where none are given; the numbers are the same on several, but for rounding.

    When `stop()` is true after a chunk, the state is saved and returned early. On several hosts all call this, with
    `rundir.Silent` for what only the first one does, and a `stop` that all agree on. Raises FloatingPointError, with the step
    and the metric's name, when a metric is not finite.
    """
    dataset, per_epoch = job.dataset, job.steps_per_epoch
    chunk = min(job.run.chunk, per_epoch)  # it ends with an epoch
    devices = devices or Devices(1)
    devices.check_divide(job.batch_size)
    images_per_step = job.batch_size * job.seeds

    def make_state(root):
        return init_state(job.init(root), job.optimizer, root, job.average)

    make_state = jax.jit(job.map_seeds(make_state, 1))
    shapes = jax.eval_shape(make_state, job.root())
    state = devices.from_first(
        lambda: checkpoints.restore(shapes, progress.note), shapes
    )
    state = devices.place(make_state(job.root()) if state is None else state)
    step = saved = int(np.max(state.step))
    directory.rewind(step, progress.note)
    progress.skip(step * images_per_step)

    train_step = make_train_step(
        job.objective, job.optimizer, devices.axis_name, job.average
    )
    run_chunk = make_run_chunk(train_step, job.batch_size, chunk, devices.count)
    run_chunk = devices.compile(job.map_seeds(run_chunk, 2), donate=True)
    image, label = devices.place(dataset.splits["train"])
    evaluations = {
        name: make_evaluate(job.objective, split, job.map_seeds, devices=devices)
        for name, split in dataset.splits.items()
        if name != "train"
    }

    def log(step, metrics):
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {step}: try a lower optimizer.learning_rate"
                )
        directory.log({"step": step, "epoch": step / per_epoch, **metrics})

    def read(end, count, history):
        """Bring a chunk's metrics to the host; this waits until the device has come so far."""
        history = {
            f"train/{name}": tuple(
                np.float64(part)[..., :count].reshape(-1, count).sum(axis=0)
                for part in values
            )
            for name, values in jax.device_get(history).items()
        }
        finite = np.isfinite([total for total, _ in history.values()]).all(axis=0)
        if not finite.all():  # name the first bad step, not the mean over the chunk
            bad = int(np.argmin(finite))
            log(
                end - count + bad + 1,
                {name: float(total[bad]) for name, (total, _) in history.items()},
            )
        means = {
            name: float(total.sum() / weight.sum())
            for name, (total, weight) in history.items()
            if weight.sum() > 0
        }
        log(end, means)
        epoch = (end - 1) // per_epoch + 1
        progress.update(count * images_per_step, epoch, means["train/loss"])

    def evaluate(epoch, state):
        """Log and draw what there is at the end of an epoch."""
        arrays = {
            split: run(state.published, state.key) for split, run in evaluations.items()
        }
        tested = {
            f"{split}/{name}": value
            for split, values in arrays.items()
            for name, value in over_seeds(values, job.seed).items()
        }
        log(epoch * per_epoch, tested)
        if not devices.first:
            return tested
        rows = [
            row
            for row in directory.history
            if "train/loss" in row and epoch - 1 < row["epoch"] <= epoch
        ]
        weights = np.diff(
            [row["step"] for row in rows], prepend=(epoch - 1) * per_epoch
        )
        trained = {
            name: float(np.average([row[name] for row in rows], weights=weights))
            for name in rows[0]
            if name.startswith("train/")
        }
        progress.epoch_done(epoch, trained | tested)
        if epoch in (1, job.epochs) or epoch % job.run.figures_every == 0:
            published = devices.single(state.published)
            draw, numbers = job.reports(published, arrays, directory.history)
            directory.save_figures(draw())
            summary = {"epochs": epoch, "steps": epoch * per_epoch}
            summary |= {"devices": devices.count, **trained, **tested, **numbers}
            summary |= best_so_far(epoch * per_epoch, tested)
            directory.write_summary(job.title, summary)
        return tested

    def best_so_far(step, tested):
        """Of the best checkpoint, which is what is used where there is one, its step and metrics."""
        if job.best is None:
            return {}
        best = step if checkpoints.is_best(tested) else checkpoints.best
        rows = [row for row in directory.history if row["step"] == best]
        row = next((row for row in rows if job.best in row), {})  # unless it was lost
        metrics = {
            name: row[name] for name in tested if name in row and "/seed" not in name
        }
        return {"best step, used by default": best} | {
            f"at the best step: {name}": value for name, value in metrics.items()
        }

    order = unread = None
    profiled = job.run.profile and devices.first
    chunks = 0
    with contextlib.ExitStack() as profiler:
        while step < job.steps:
            epoch, first = divmod(step, per_epoch)
            if order is None or first == 0:
                order = devices.place(job.order(epoch + 1))
            if profiled and chunks == PROFILED.start:
                profiler.enter_context(jax.profiler.trace(directory.path / "profile"))
            count = min(chunk, per_epoch - first)
            state, history = run_chunk(state, order, first, count, image, label)
            if unread:  # a chunk late, while the device is busy with the next one
                read(*unread)
            step, chunks = step + count, chunks + 1
            unread = (step, count, history)
            if profiled and chunks == PROFILED.stop:
                jax.block_until_ready(state)
                profiler.close()

            epoch_ended, stopping = step % per_epoch == 0, stop()
            due = stopping or step == job.steps or step - saved >= job.run.save_every
            if epoch_ended or due:
                read(*unread)
                unread = None
            tested = evaluate(epoch + 1, state) if epoch_ended else {}
            if due or checkpoints.is_best(tested):
                directory.upload()
                checkpoints.save(step, state, tested)
                saved = step
            if stopping:
                break
    if profiled and chunks <= PROFILED.start:
        progress.note("too few chunks for a profile: lower run.chunk")
    return state
