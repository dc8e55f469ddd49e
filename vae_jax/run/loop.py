"""The training loop: restore, run some steps, log, evaluate, draw, save. It does not know which model it trains.

A step's logs reach the disk before its checkpoint does, so a resumed run equals an uninterrupted one.
"""

from collections.abc import Callable
from contextlib import closing, nullcontext
from functools import cache, partial
from typing import Any

import jax
import numpy as np

from vae_jax.evaluation.verdict import discriminator_wins, verdict
from vae_jax.run.checkpoint import Checkpoints
from vae_jax.run.devices import Devices
from vae_jax.run.directory import RunDirectory
from vae_jax.run.feed import make_feed
from vae_jax.run.hosts import NotPrimary, gather, raise_on_all_hosts
from vae_jax.run.job import Job, make_programs
from vae_jax.run.loggers import Loggers
from vae_jax.run.profile import Profile
from vae_jax.run.progress import Progress
from vae_jax.run.seeds import first_seed
from vae_jax.steps import Total, TrainState


def train(
    job: Job,
    directory: RunDirectory,
    checkpoints: Checkpoints,
    progress: Progress,
    stop: Callable[[], bool] = lambda: False,
    devices: Devices | None = None,
) -> TrainState:
    """Train to the end, from the latest checkpoint if there is one. Returns the last state, on the devices.

    The default is one device; several devices give the same numbers up to rounding. If `stop()` is true after a call of
    the compiled program, the state is saved and returned early. Every host must call this, with `hosts.NotPrimary` in
    place of what only the primary host has, and with a `stop` on which all hosts agree.

    Raises FloatingPointError, naming step and metric, when a metric is not finite.
    """
    return Loop(job, directory, checkpoints, progress, devices or Devices(1)).run(stop)


class Loop:
    """One training: its programs, and the places it writes to."""

    def __init__(self, job, directory, checkpoints, progress, devices):
        devices.check_divide(job.batch_size)
        self.job, self.directory, self.checkpoints = job, directory, checkpoints
        self.progress, self.devices = progress, devices
        self.per_epoch = job.steps_per_epoch
        self.images_per_step = job.batch_size * len(job.seeds)
        self.programs = make_programs(job, devices)
        self.route, self.warned = job.make_route(), False
        self.about = cache(job.about)
        self.feed = make_feed(job, devices, progress.note)

    def run(self, stop: Callable[[], bool]) -> TrainState:
        state = self.restore()
        self.loggers = self.open_loggers(int(np.max(state.step)))
        with closing(self.loggers):
            return self.train_from(state, stop)

    def open_loggers(self, step: int) -> Any:
        """Open the loggers that `run.log_to` names."""
        if not self.devices.is_primary:
            return NotPrimary()
        return Loggers(self.job.run.log_to, self.directory, step, self.progress.note)

    def train_from(self, state: TrainState, stop: Callable[[], bool]) -> TrainState:
        job, checkpoints = self.job, self.checkpoints
        step = saved = int(np.max(state.step))
        unread = None
        ended = gather(checkpoints.stopped_early)[0]
        self.progress.doing("compiling")
        traced = job.run.profile and self.devices.is_primary
        with Profile(self.directory.path / "profile" if traced else None, self.progress.note) as profile:
            while step < job.steps and not ended:
                epoch, first = divmod(step, self.per_epoch)
                count = min(job.steps_per_call, self.per_epoch - first)
                profile.before_call()
                state, history = self.programs.run_steps(state, *self.feed(epoch + 1, first, count))
                if unread:  # one call late, while the device is busy with the next one
                    self.read(*unread)
                step += count
                unread = (step, count, history)
                profile.after_call(state)

                epoch_ended, stopping = step % self.per_epoch == 0, stop()
                due = stopping or step == job.steps or step - saved >= job.run.save_every
                if epoch_ended or due:
                    self.read(*unread)
                    unread = None
                tested, ended = self.end_epoch(epoch + 1, state) if epoch_ended else ({}, False)
                if due or ended or checkpoints.is_best(tested):
                    self.loggers.flush()
                    self.directory.upload()
                    checkpoints.save(step, state, tested, self.directory.log_digest(), ended)
                    self.directory.mark_saved(step)
                    saved = step
                if stopping:
                    break
        return state

    def restore(self) -> TrainState:
        """Restore the latest checkpoint's state, or make the initial one; drop later rows of the log."""
        job, devices, make_state = self.job, self.devices, self.programs.make_state
        shapes = jax.eval_shape(make_state, job.root())
        state = devices.broadcast(lambda: self.checkpoints.restore(shapes, self.progress.note), shapes)
        state = devices.replicate(make_state(job.root()) if state is None else state)
        step = int(np.max(state.step))
        with raise_on_all_hosts():
            log = self.checkpoints.restored and self.checkpoints.restored["log"]
            intact = self.directory.rewind(step, log)
        if not gather(intact)[0]:
            self.repair_log(shapes, state, log)
        self.progress.skip(step * self.images_per_step)
        return state

    def repair_log(self, shapes: TrainState, state: TrainState, log: dict | None) -> None:
        """Log again evaluations that metrics.jsonl has lost, if their checkpoints are kept; report what was done."""
        directory, devices = self.directory, self.devices
        evaluated = {row["step"] for row in directory.history if "test/loss" in row}
        lost = [step for step in self.checkpoints.kept if step % self.per_epoch == 0 and step not in evaluated]
        for step in gather(lost)[0]:
            make = partial(self.checkpoints.restore_evaluated, step, shapes)
            variables = devices.replicate(devices.broadcast(make, shapes.eval_variables))
            tested, _ = self.evaluate(variables, state.key)
            directory.insert({"step": step, "epoch": step / self.per_epoch, **tested})
        if log is None:  # this is not the primary host
            return
        if directory.log_digest() == log:
            self.progress.note("metrics.jsonl did not match the checkpoint: it is repaired")
        else:
            rows = f"{log['rows']} rows then, {len(directory.history)} now"
            self.progress.note(
                f"metrics.jsonl does not match the checkpoint ({rows}); the training does not depend on it"
            )

    def read(self, end: int, count: int, history: dict[str, Total]) -> None:
        """Log the metrics of the last `count` steps, up to step `end`; wait until the device has computed them."""
        totals = {
            f"train/{name}": [np.float64(part)[..., :count].reshape(-1, count).sum(axis=0) for part in pair]
            for name, pair in jax.device_get(history).items()
        }
        finite = np.isfinite([total for total, _ in totals.values()]).all(axis=0)
        if not finite.all():  # name the first bad step, not the mean over the call
            bad = int(np.argmin(finite))
            named = {name: float(total[bad]) for name, (total, _) in totals.items()}
            self.log(end - count + bad + 1, named)
        means = {
            name: float(total.sum() / weight.sum()) for name, (total, weight) in totals.items() if weight.sum() > 0
        }
        self.log(end, means)
        epoch = (end - 1) // self.per_epoch + 1
        self.progress.update(count * self.images_per_step, epoch, means["train/loss"])

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        for name, value in metrics.items():
            if not np.all(np.isfinite(value)):
                raise FloatingPointError(f"{name} is {value} at step {step}: {advice(step)}")
        row = {"step": step, "epoch": step / self.per_epoch, **metrics}
        self.directory.log(row)
        self.loggers.log(row)

    def end_epoch(self, epoch: int, state: TrainState) -> tuple[dict[str, Any], bool]:
        """Evaluate, log and draw at the end of an epoch.

        Returns the metrics of the splits that are not trained on, and whether the training has run out of patience.
        """
        self.progress.doing(f"evaluating epoch {epoch}")
        tested, arrays = self.evaluate(state.eval_variables, state.key)
        self.log(epoch * self.per_epoch, tested)
        waited = gather(self.epochs_since_best(epoch, tested))[0] if self.job.patience else 0
        ended = 0 < self.job.patience <= waited
        last, final = ended or epoch == self.job.epochs, {}
        if last:
            # A failure of one of several hosts must end them all.
            reported = self.progress.reported if jax.process_count() == 1 else nullcontext
            with reported("the last measurements"):
                final = self.job.evaluate_finally(state.eval_variables, state.key, self.devices)
        if self.devices.is_primary:
            trained = self.mean_over_epoch(epoch)
            self.progress.epoch_done(epoch, trained | tested, last)
            if ended:
                stopped = f"{self.job.best[0]} has not improved for {waited} epochs, since epoch {epoch - waited}"
                self.progress.note(f"the training ends after epoch {epoch}: {stopped}")
                final["stopped early"] = stopped
            if (warning := discriminator_wins(trained, "train")) and not self.warned:
                self.progress.note(f"epoch {epoch}: {': '.join(warning)}")
                self.warned = True
            if epoch == 1 or last or epoch % self.job.run.figures_every == 0:
                with self.progress.reported(f"the figures of epoch {epoch}"):
                    self.draw(epoch, state, arrays["test"])
                with self.progress.reported(f"the summary of epoch {epoch}"):
                    self.summarize(epoch, state, trained | tested | final)
        return tested, ended

    def epochs_since_best(self, epoch: int, tested: dict) -> int:
        """Epochs since the metric `best` last improved, at the end of `epoch`; 0 if there is no best checkpoint."""
        if self.job.best is None or self.checkpoints.best is None or self.checkpoints.is_best(tested):
            return 0
        return epoch - self.checkpoints.best["step"] // self.per_epoch

    def evaluate(self, variables: Any, key: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The metrics of the splits that are not trained on, and the probes' measurements on each."""
        tested, arrays = {}, {}
        for split, evaluate in self.programs.evaluations.items():
            numbers, arrays[split] = evaluate(variables, key)
            tested |= {f"{split}/{name}": value for name, value in numbers.items()}
        return tested, arrays

    def mean_over_epoch(self, epoch: int) -> dict[str, float]:
        """The training metrics of an epoch, each row weighted by its steps."""
        rows = [row for row in self.directory.history if "train/loss" in row and epoch - 1 < row["epoch"] <= epoch]
        counts = np.diff([row["step"] for row in rows], prepend=(epoch - 1) * self.per_epoch)
        means = {}
        for name in dict.fromkeys(name for row in rows for name in row if name.startswith("train/")):
            value, steps = np.transpose([(row[name], count) for row, count in zip(rows, counts) if name in row])
            means[name] = float(np.average(value, weights=steps))
        return means

    def draw(self, epoch: int, state: TrainState, arrays: dict[str, np.ndarray]) -> None:
        """Draw the figures for the first seed."""
        job, variables = self.job, self.devices.local_copy(state.eval_variables)
        figures = job.figures(first_seed(variables, job.seeds), arrays, self.directory.history, job.baselines())
        self.directory.save_figures(figures, epoch)
        self.loggers.show(epoch * self.per_epoch, self.directory.path / "figures")

    def summarize(self, epoch: int, state: TrainState, found: dict) -> None:
        """Write the summary of the metrics `found` in training and on the other splits."""
        step = epoch * self.per_epoch
        numbers = {"epochs": epoch, "steps": step, "devices": self.devices.count}
        tested = {name: value for name, value in found.items() if not name.startswith("train/")}
        baselines, ledger = self.job.baselines(), self.job.ledger(tested, "test")
        numbers |= found | verdict(found | ledger, "test", baselines) | ledger | baselines
        if self.job.dataset.notes:
            numbers["what was done to the images"] = "; ".join(self.job.dataset.notes)
        routing = self.route(self.devices.local_copy(state.variables))
        about = self.about()._replace(routing=routing)
        self.directory.write_summary(self.job.title, numbers | self.best_so_far(step, tested), about)

    def best_so_far(self, step: int, tested: dict) -> dict[str, Any]:
        """The step of the best checkpoint and its metrics."""
        if self.job.best is None:
            return {}
        is_best = self.checkpoints.best is None or self.checkpoints.is_best(tested)
        best = step if is_best else self.checkpoints.best["step"]
        metric, _ = self.job.best
        rows = [row for row in self.directory.history if row["step"] == best]
        row = next((row for row in rows if metric in row), {})  # {} if it was lost
        return {"best step": best} | {
            f"at the best step: {name}": row[name] for name in tested if name in row and "/seed" not in name
        }


def advice(step: int) -> str:
    """What to change after a non-finite number. Before the first update, the learning rate cannot be the cause."""
    if step > 1:
        return "try a lower optimizer.learning_rate, with another --workdir"
    return "no update had been made, so try smaller numbers in the sections objective and model"
