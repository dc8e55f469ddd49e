"""Checkpoints of a run, written and read by Orbax, which no other file imports.

A checkpoint holds `state`, which training needs to resume; `variables`, which suffice for inference; and `metadata`:
the config, a fingerprint of the data, which checkpoint is the best so far, and a digest of the rows of metrics.jsonl.
"""

import contextlib
import errno
import fcntl
import itertools
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from vae_jax.run.devices import unwrap_keys
from vae_jax.run.environment import differences
from vae_jax.run.files import describe_error, is_remote
from vae_jax.run.stored import DIGESTS, absolute, check_same_data, digests, latest_saved, locked, select, steps, survey
from vae_jax.steps import TrainState

OVERHEAD = 2**20  # bytes of a checkpoint besides its arrays
FILES = 64  # most files of a checkpoint and of Orbax while it writes
BLOCK = bytes(2**16)
PRIMARY = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="primary")


class Checkpoints:
    """The checkpoints of one training: saves them, restores the latest, keeps the latest ones and the best one.

    Only the primary host may create an instance.

    Args:
        folder: local or on gs://; created if missing.
        metadata: stored with each checkpoint, as JSON.
        keep: number of latest checkpoints to keep.
        best: the metric that ranks checkpoints and its better direction, such as ("validation/loss", "lower"); with
            None there is no best checkpoint.

    Attributes:
        restored: the metadata of the checkpoint that training resumes from; None if it starts anew.
        kept: the steps of the undamaged checkpoints when training resumed.
        best: {"step", "cost"} of the best checkpoint so far, damaged or not; None if there is none.
        stopped_early: whether the latest checkpoint is the end of a training that ran out of patience.
    """

    restored: dict | None = None
    kept: tuple[int, ...] = ()
    best: dict | None = None
    stopped_early: bool = False

    def __init__(self, folder, metadata: dict, keep: int, best: tuple[str, str] | None = None):
        self._folder = absolute(folder)
        self._metadata, self._keep, self._metric = metadata, keep, best
        self._folder.mkdir(parents=True, exist_ok=True)
        for leftover in self._folder.glob("*.tmp*"):  # left by a killed process
            leftover.rmtree()

    def is_best(self, metrics: dict) -> bool:
        """Whether a checkpoint with these metrics would become the best one; a tie does not."""
        cost = self._cost(metrics)
        return cost is not None and (self.best is None or cost < self.best["cost"])

    def _cost(self, metrics):
        """The ranking metric with the sign that makes lower better; None if it was not evaluated."""
        if self._metric is None or self._metric[0] not in metrics:
            return None
        name, better = self._metric
        return -metrics[name] if better == "higher" else metrics[name]

    def restore(self, like: TrainState, note: Callable[[str], None]) -> TrainState | None:
        """The latest state, in the shapes of `like`, as NumPy arrays and the root key; None if there is no checkpoint.

        Every damaged checkpoint is reported in one line through `note` and renamed; the latest of the others is
        restored. Raises OSError if all are damaged, and if the checkpoint was trained on other data or does not fit
        `like`.
        """
        kept, damaged = survey(self._folder)
        if damaged and not kept and not self._may_be_unfinished():
            raise OSError(
                f"no checkpoint in {self._folder} can be read ({next(iter(damaged.values()))}): "
                "move the whole run directory away to start again, or name another --workdir"
            )
        for step, problem in damaged.items():
            note(f"{problem}; renamed {self._set_aside(step).name}")
        if not kept:
            return None
        step, self.restored = next(iter(kept.items()))
        self.kept, self.best = tuple(kept), self.restored["best"]
        self.stopped_early = self.restored.get("stopped_early", False)
        if (latest := latest_saved(self._folder)) > step and latest not in damaged:
            note(f"checkpoint {latest} is lost: training repeats the steps since {step}")
        check_same_data(self.restored, self._metadata)
        if self.best and self.best["step"] not in kept:
            note(f"the best checkpoint, of step {self.best['step']}, is lost; only a better one replaces it")
        if changed := differences(self.restored.get("environment", {}), self._metadata.get("environment", {})):
            note(
                f"the environment has changed since checkpoint {step} ({changed}): "
                "from here on the numbers differ, at least by rounding"
            )
        try:
            state = _restore(self._folder, step, "state", jax.eval_shape(unwrap_keys, like))
        except ValueError as error:
            way_out = "move it away to continue from an earlier one, or name another --workdir"
            if "random numbers" in changed:
                way_out = "set JAX's random numbers back to those of the checkpoint, or name another --workdir"
            raise OSError(f"{error}: {way_out}") from error
        return state.replace(key=jax.random.wrap_key_data(state.key))

    def restore_evaluated(self, step: int, like: TrainState) -> dict:
        """The variables that were evaluated at `step`, as NumPy arrays in the shapes of the state `like`."""
        return restore_variables(self._folder, step, like.eval_variables)

    def _set_aside(self, step):
        """Rename a damaged checkpoint; returns its new path."""
        names = (self._folder / f"damaged-{step}-{i}" for i in itertools.count(1))
        path = next(name for name in names if not name.exists())
        return (self._folder / str(step)).rename(path)

    def save(
        self, step: int, state: TrainState, metrics: dict, log: dict | None = None, stopped_early: bool = False
    ) -> None:
        """Write the checkpoint of `step` atomically, then delete those that are no longer kept.

        Args:
            metrics: the metrics of its evaluation, {} if there was none.
            log: the digest of the log's rows up to `step`, from `RunDirectory.log_digest`.
            stopped_early: whether the training ends here because it has run out of patience.

        Raises FloatingPointError if a value is not finite, and OSError if the checkpoint cannot be written.
        """
        trees = jax.device_get(unwrap_keys((state, state.eval_variables)))
        state, variables = jax.tree.map(np.asarray, trees)
        for name, leaf in _named_leaves(state):
            if not np.isfinite(leaf).all():
                raise FloatingPointError(
                    f"{name} is not finite at step {step}: try a lower optimizer.learning_rate, with another --workdir"
                )
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves((state, variables))))
        best = {"step": step, "cost": self._cost(metrics)} if self.is_best(metrics) else self.best
        items = {
            "state": ocp.args.StandardSave(state),
            "variables": ocp.args.StandardSave(variables),
            "metadata": ocp.args.JsonSave(
                self._metadata | {"step": step, "best": best, "log": log, "stopped_early": stopped_early}
            ),
        }
        part = self._folder / f"{step}.tmp"
        try:
            with _checkpointer() as checkpointer:
                checkpointer.save(part, ocp.args.Composite(**items))
            (part / DIGESTS).write_text(json.dumps(digests(part), indent=1))
            part.rename(self._folder / str(step))
        except Exception as error:  # a full disk can raise almost anything
            raise OSError(
                f"checkpoint {step} was not saved ({describe_error(error)}): the same command continues from the one "
                "before"
            ) from error
        self.best, self.stopped_early = best, stopped_early
        for old in steps(self._folder)[self._keep :]:
            if best is None or old != best["step"]:
                self._delete(old)

    def _may_be_unfinished(self):
        """Whether a kill in the first save may have left a part of it: on gs:// renaming is not atomic."""
        return is_remote(str(self._folder)) and not latest_saved(self._folder)

    def _delete(self, step):
        path = self._folder / str(step)
        if not os.path.isdir(path):  # on gs:// renaming would copy it
            path.rmtree()
            return
        with contextlib.suppress(BlockingIOError), locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB):
            # A checkpoint that is being read stays; a later save deletes it.
            path.rename(self._folder / f"{step}.deleted.tmp").rmtree()

    def _check_room(self, nbytes):
        """Write `nbytes` to raise the system's OSError if the disk is full: Orbax would print a hundred lines."""
        if not os.path.isdir(self._folder):  # gs:// is never full
            return
        space = os.statvfs(self._folder)
        if space.f_files and space.f_favail < FILES:
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} for more files", str(self._folder))
        with tempfile.TemporaryFile(dir=self._folder) as file:
            for _ in range(0, nbytes + OVERHEAD, len(BLOCK)):
                file.write(BLOCK)


def load(folder, which: str | int, shapes: Callable[[dict], Any]) -> tuple[dict, dict]:
    """Load the metadata of the checkpoint that `select` chooses, and its variables in the shapes of `shapes(metadata)`.

    A training may save and delete checkpoints meanwhile.
    """
    while True:
        before = steps(folder)
        try:
            metadata = select(folder, which)
            with locked(absolute(folder) / str(metadata["step"]), fcntl.LOCK_SH):
                return metadata, restore_variables(folder, metadata["step"], shapes(metadata))
        except (ValueError, FileNotFoundError):
            if steps(folder) == before:
                raise
            # The chosen checkpoint has been deleted: choose again.


def restore_variables(folder, step: int, like: Any) -> dict:
    """Restore a checkpoint's evaluated variables as NumPy arrays in the shapes of `like`.

    Raises ValueError for damage and for variables that do not fit.
    """
    return _restore(folder, step, "variables", like)


def _checkpointer():
    handler = ocp.CompositeCheckpointHandler(composite_options=ocp.CompositeOptions(multiprocessing_options=PRIMARY))
    return ocp.Checkpointer(handler, multiprocessing_options=PRIMARY)


def _restore(folder, step, item, like):
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    try:
        with _checkpointer() as checkpointer:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
            tree = checkpointer.restore(absolute(folder) / str(step), args=args)[item]
    except Exception as error:  # damage can raise almost anything
        raise ValueError(f"checkpoint {step} cannot be read ({describe_error(error)})") from error
    for (name, leaf), wanted in zip(_named_leaves(tree), jax.tree.leaves(like)):
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            what = "shape" if leaf.shape != wanted.shape else "dtype"
            there, here = (getattr(one, what) for one in (leaf, wanted))
            raise ValueError(f"checkpoint {step} is of another model: {name} is {there} there, {here} here")
    return tree


def _named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
