"""Checkpoints of a run by Orbax; the only file that knows it.

A checkpoint holds `state`, all that training needs to continue; `variables`, the ones to evaluate, which suffice for
inference; and `metadata`: the config, what the model was built for, the metric that marks the best checkpoint. Orbax
does not notice a flipped bit, so each checkpoint also lists the SHA-256 of its files.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from vae_jax.run.devices import unwrap_keys
from vae_jax.run.files import describe_error
from vae_jax.steps import TrainState

DIGESTS = "sha256.json"
OVERHEAD = 2**20  # bytes of a checkpoint that are not numbers
BLOCK = bytes(2**16)
FIRST_HOST = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="first")


class Checkpoints:
    """The checkpoints that a training writes and continues from: the latest ones and the best one are kept.

    Of several hosts only the first one may have it.

    Args:
        folder: created if need be; of a file system, or on gs://.
        metadata: stored with each, as JSON.
        keep: how many of the latest are kept.
        best: the metric that marks the best one and its better direction, such as ("validation/loss", "lower"); None
            keeps no best one.
    """

    def __init__(
        self,
        folder,
        metadata: dict,
        keep: int,
        best: tuple[str, str] | None = None,
    ):
        self._folder = absolute(folder)
        self._metadata, self._mark = metadata, best
        self._policy = _LatestAndBest(keep, *_best(self._folder))
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,  # which Orbax refuses where it shall not wait for other hosts
            multiprocessing_options=FIRST_HOST,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            preservation_policy=self._policy,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def restore(self, like: TrainState, note: Callable[[str], None]) -> TrainState | None:
        """The latest state, of the shapes in `like`, all but the root key NumPy arrays; None if there is no checkpoint.

        Damaged checkpoints are told by `note` and renamed, and the one before them is taken. Raises OSError if all of
        them are damaged, or if what they were trained on is not what it is now.
        """
        found = steps(self._folder)
        damaged = []
        for step in found:
            try:
                metadata = read_metadata(self._folder, step)
                state = _restore(self._folder, step, "state", jax.eval_shape(unwrap_keys, like))
            except ValueError as error:
                note(f"{error}; looking for an earlier one")
                damaged.append(step)
                continue
            check_same_data(metadata, self._metadata)
            if damaged:
                self._set_aside(damaged)
            return state.replace(key=jax.random.wrap_key_data(state.key))
        if found:
            raise OSError(
                f"no checkpoint in {self._folder} can be read: move them away to start again, or name another --workdir"
            )
        return None

    def _set_aside(self, damaged):
        """Training will come to their steps again, and Orbax takes no step below the latest."""
        for step in damaged:
            names = (f"damaged-{step}-{i}" for i in itertools.count(1))
            free = next(name for name in names if not (self._folder / name).exists())
            (self._folder / str(step)).rename(self._folder / free)
        self._manager.reload()
        self._policy.cost, self._policy.best = _best(self._folder)

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint."""
        return self._policy.best

    def is_best(self, metrics: dict) -> bool:
        """Whether a checkpoint with these metrics would be the best one; of equal ones it is the first."""
        return _cost(self._marked(metrics)) < self._policy.cost

    def _marked(self, metrics):
        if self._mark is None or self._mark[0] not in metrics:
            return None
        metric, better = self._mark
        return {"metric": metric, "better": better, "value": metrics[metric]}

    def save(self, step: int, state: TrainState, metrics: dict) -> None:
        """Write the checkpoint of `step`, whole or not at all; `metrics` are those of its evaluation, if there was one.

        Raises FloatingPointError where a value is not finite, and OSError where it cannot be written.
        """
        best = self._marked(metrics)
        if _cost(best) < self._policy.cost:
            self._policy.cost, self._policy.best = _cost(best), step
        state, variables = _to_host(state), _to_host(state.eval_variables)
        _check_finite(state, step)
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves((state, variables))))
        try:
            saved = self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state),
                    variables=ocp.args.StandardSave(variables),
                    metadata=ocp.args.JsonSave(self._metadata | {"step": step, "best": best}),
                ),
            )
            if saved:
                part = self._folder / str(step) / f"{DIGESTS}.tmp"
                part.write_text(json.dumps(_digests(part.parent), indent=1))
                part.rename(part.parent / DIGESTS)
        except Exception as error:  # a full disk shows as almost anything
            raise OSError(
                f"checkpoint {step} was not saved ({describe_error(error)}): the same command continues from the last whole one"
            ) from error
        if not saved:
            raise OSError(f"checkpoint {step} was not saved: {self._folder} has later ones")

    def _check_room(self, nbytes):
        """Write as much, and raise the system's OSError: of a full disk Orbax's threads tell in a hundred lines."""
        if not os.path.isdir(self._folder):  # but on gs://, which is never full
            return
        with tempfile.TemporaryFile(dir=self._folder) as file:
            for _ in range(0, nbytes + OVERHEAD, len(BLOCK)):
                file.write(BLOCK)

    def close(self) -> None:
        """Release what Orbax holds."""
        self._manager.close()


class _LatestAndBest(PreservationPolicy):
    def __init__(self, keep, cost, best):
        self.keep, self.cost, self.best = keep, cost, best

    def should_preserve(self, checkpoints, *, context):
        latest = len(checkpoints) - self.keep
        return [i >= latest or info.step == self.best for i, info in enumerate(checkpoints)]


def steps(folder) -> list[int]:
    """The steps of which `folder` holds checkpoints, the latest first."""
    folder = epath.Path(folder)
    found = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    return sorted(found, reverse=True)


def latest_metadata(folder) -> dict | None:
    """What is stored about the latest checkpoint that is not damaged; None if there is none."""
    for step in steps(folder):
        with contextlib.suppress(ValueError):
            return read_metadata(folder, step)
    return None


def check_same_data(stored: dict, metadata: dict) -> None:
    """Raise OSError unless the data that a checkpoint says it is of are those of now; the config may change in parts."""
    for name, value in metadata.items():
        if name != "config" and stored.get(name) != json.loads(json.dumps(value)):
            raise OSError(
                f"{name} is not what it was when checkpoint {stored['step']} was saved: give the same data, or name another --workdir"
            )


def select(folder, which: str | int = "") -> int:
    """The step that `which` means: "best", "latest", a number, or "" for the best where there is one, else the latest.

    Raises ValueError if there is no such checkpoint.
    """
    found, (_, best) = steps(folder), _best(folder)
    if not found:
        raise ValueError(f"there is no checkpoint in {folder}: train first")
    if which == "best" and best is None:
        raise ValueError(
            f"no checkpoint in {folder} is the best yet: that takes an epoch with validation images (data.validation)"
        )
    names = {"latest": found[0], "best": best, "": found[0] if best is None else best}
    names |= {str(step): step for step in found}
    if str(which) not in names:
        raise ValueError(
            f"there is no checkpoint {which!r} in {folder}: give latest, best, or one of {', '.join(map(str, found))}"
        )
    return names[str(which)]


def read_metadata(folder, step: int) -> dict:
    """What is stored about a checkpoint. Raises ValueError, naming the file, if any of its files is damaged."""
    path = absolute(folder) / str(step)
    _check_files(path, step)
    try:
        return json.loads((path / "metadata" / "metadata").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {step} is damaged: {path / 'metadata'}") from error


def restore_variables(folder, step: int, like: Any) -> dict:
    """The published variables of a checkpoint, NumPy arrays of the shapes in `like`. Raises ValueError if it is damaged."""
    return _restore(folder, step, "variables", like)


def _restore(folder, step, item, like):
    path = absolute(folder) / str(step)
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    try:
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=FIRST_HOST)
        )
        with ocp.Checkpointer(handler, multiprocessing_options=FIRST_HOST) as checkpointer:
            args = {item: ocp.args.StandardRestore(like)}
            tree = checkpointer.restore(path, args=ocp.args.Composite(**args))[item]
    except Exception as error:  # damage shows as almost anything
        raise ValueError(f"checkpoint {step} cannot be read ({describe_error(error)})") from error
    for (place, leaf), wanted in zip(jax.tree_util.tree_leaves_with_path(tree), jax.tree.leaves(like)):
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise ValueError(
                f"checkpoint {step} is of another model: {name} is {leaf.shape} there, {wanted.shape} here"
            )
    return tree


def absolute(folder):
    """As Orbax wants it. Of a path on gs:// `resolve` would make one of this machine."""
    path = epath.Path(folder)
    return path if path.is_absolute() else path.resolve()


def _check_finite(state, step):
    for place, leaf in jax.tree_util.tree_leaves_with_path(state):
        if not np.isfinite(leaf).all():
            name = jax.tree_util.keystr(place, simple=True, separator="/")
            raise FloatingPointError(f"{name} is not finite at step {step}: try a lower optimizer.learning_rate")


def _check_files(path, step):
    """Raise ValueError if a file is not what was saved. A run killed before it could write the list has none."""
    try:
        expected = json.loads((path / DIGESTS).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {step} is damaged: {path / DIGESTS}") from error
    try:
        found = _digests(path)
    except OSError as error:  # a bad block, say
        raise ValueError(f"checkpoint {step} is damaged: {error}") from error
    for name in expected:
        if found.get(name) != expected[name]:
            what = "changed" if name in found else "missing"
            raise ValueError(f"checkpoint {step} is damaged: {path / name} is {what}")


def _digests(path):
    """{name: SHA-256} of the files below a folder."""
    return {
        str(file.relative_to(path)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in _files(path)
        if DIGESTS not in file.name
    }


def _files(path):
    for child in path.iterdir():
        yield from _files(child) if child.is_dir() else [child]


def _cost(best):
    """What is lowest for the best checkpoint; infinite where there is no metric."""
    if best is None:
        return math.inf
    return -best["value"] if best["better"] == "higher" else best["value"]


def _best(folder):
    """The lowest cost of the whole checkpoints that have a metric, and the first step with it."""
    costs = [(math.inf, None)]
    for step in steps(folder):
        with contextlib.suppress(ValueError):
            best = read_metadata(folder, step)["best"]
            costs += [(_cost(best), step)] if best else []
    return min(costs)


def _to_host(tree):
    return jax.tree.map(np.asarray, jax.device_get(unwrap_keys(tree)))
