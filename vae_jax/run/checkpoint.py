"""Checkpoints of a run, written by Orbax, which no other file imports.

A checkpoint holds `state`, which training needs to continue; `variables`, which suffice for inference; and `metadata`: the
config, the data, and the cost that ranks the checkpoint. Orbax does not detect a flipped bit, so each checkpoint also
lists the SHA-256 of its files.
"""

import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vae_jax.run.devices import unwrap_keys
from vae_jax.run.directory import OLD_FORMAT
from vae_jax.run.files import describe_error
from vae_jax.steps import TrainState

DIGESTS = "sha256.json"
OVERHEAD = 2**20  # bytes of a checkpoint besides its arrays
BLOCK = bytes(2**16)
PRIMARY = ocp.options.MultiprocessingOptions(primary_host=0, active_processes={0}, barrier_sync_key_prefix="primary")


class Checkpoints:
    """The checkpoints of one training: saves them, restores the latest, keeps the latest ones and the best one.

    Only the primary host may create one.

    Args:
        folder: local or on gs://; created if missing.
        metadata: stored with each checkpoint, as JSON.
        keep: number of latest checkpoints to keep.
        best: the metric that ranks checkpoints and its better direction, such as ("validation/loss", "lower"); with None
            there is no best checkpoint.
    """

    def __init__(self, folder, metadata: dict, keep: int, best: tuple[str, str] | None = None):
        self._folder = absolute(folder)
        self._metadata, self._keep, self._metric = metadata, keep, best
        self._costs = _read_costs(self._folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        options = ocp.CheckpointManagerOptions(
            create=False,  # Orbax refuses to create a folder for one host of several
            multiprocessing_options=PRIMARY,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            preservation_policy=self,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Orbax's PreservationPolicy. Orbax's own BestN would rank by files that nothing has verified."""
        oldest = len(checkpoints) - self._keep
        return [i >= oldest or info.step == self.best for i, info in enumerate(checkpoints)]

    @property
    def best(self) -> int | None:
        """The step of the best checkpoint."""
        return _lowest(self._costs)

    def is_best(self, metrics: dict) -> bool:
        """Whether a checkpoint with these metrics would become the best one; a tie does not."""
        cost = self._cost(metrics)
        return cost is not None and cost < min(self._costs.values(), default=math.inf)

    def _cost(self, metrics):
        """The ranking metric with the sign that makes lower better; None if it was not evaluated."""
        if self._metric is None or self._metric[0] not in metrics:
            return None
        name, better = self._metric
        return -metrics[name] if better == "higher" else metrics[name]

    def restore(self, like: TrainState, note: Callable[[str], None]) -> TrainState | None:
        """The latest state, in the shapes of `like`, as NumPy arrays and the root key; None if there is no checkpoint.

        A damaged checkpoint is reported in one line through `note` and renamed, and the one before it is restored. Raises
        OSError if all are damaged, or if the checkpoint was trained on other data.
        """
        damaged: list[int] = []
        for step in steps(self._folder):
            try:
                metadata = read_metadata(self._folder, step)
                state = _restore(self._folder, step, "state", jax.eval_shape(unwrap_keys, like))
            except ValueError as error:
                note(f"{error}; trying an earlier one")
                damaged.append(step)
                continue
            check_same_data(metadata, self._metadata)
            if damaged:
                self._rename(damaged)
            return state.replace(key=jax.random.wrap_key_data(state.key))
        if damaged:
            raise OSError(
                f"no checkpoint in {self._folder} can be read: move them away to start again, or name another --workdir"
            )
        return None

    def _rename(self, damaged):
        """Rename damaged checkpoints: training will save these steps again, and Orbax saves no step below the latest."""
        for step in damaged:
            names = (self._folder / f"damaged-{step}-{i}" for i in itertools.count(1))
            (self._folder / str(step)).rename(next(name for name in names if not name.exists()))
            self._costs.pop(step, None)
        self._manager.reload()

    def save(self, step: int, state: TrainState, metrics: dict) -> None:
        """Write the checkpoint of `step` atomically; `metrics` are those of its evaluation, {} if there was none.

        Raises FloatingPointError if a value is not finite, and OSError if the checkpoint cannot be written.
        """
        trees = jax.device_get(unwrap_keys((state, state.eval_variables)))
        state, variables = jax.tree.map(np.asarray, trees)
        for name, leaf in _named_leaves(state):
            if not np.isfinite(leaf).all():
                raise FloatingPointError(f"{name} is not finite at step {step}: try a lower optimizer.learning_rate")
        self._check_room(sum(leaf.nbytes for leaf in jax.tree.leaves((state, variables))))
        cost = self._cost(metrics)
        if cost is not None:
            self._costs[step] = cost
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            variables=ocp.args.StandardSave(variables),
            metadata=ocp.args.JsonSave(self._metadata | {"step": step, "cost": cost}),
        )
        try:
            if not self._manager.save(step, args=items):
                raise FileExistsError("there is a later one")
            _write_digests(self._folder / str(step))
        except Exception as error:  # a full disk can raise almost anything
            raise OSError(
                f"checkpoint {step} was not saved ({describe_error(error)}): the same command continues from the one before"
            ) from error

    def _check_room(self, nbytes):
        """Raise the system's OSError if the disk is full, by writing as many bytes: Orbax would print a hundred lines."""
        if not os.path.isdir(self._folder):  # gs:// is never full
            return
        with tempfile.TemporaryFile(dir=self._folder) as file:
            for _ in range(0, nbytes + OVERHEAD, len(BLOCK)):
                file.write(BLOCK)

    def close(self) -> None:
        """Release Orbax's resources."""
        self._manager.close()


def steps(folder) -> list[int]:
    """The steps of the checkpoints in `folder`, latest first."""
    folder = epath.Path(folder)
    found = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    return sorted(found, reverse=True)


def select(folder, which: str | int = "") -> int:
    """The step named by `which`: "best", "latest", a step, or "" for the best if there is one, else the latest.

    Raises ValueError if there is no such checkpoint.
    """
    found = steps(folder)
    if not found:
        raise ValueError(f"there is no checkpoint in {folder}: train first")
    names = {"latest": found[0]} | {str(step): step for step in found}
    if which in ("", "best"):
        best = _lowest(_read_costs(folder))
        if which and best is None:
            raise ValueError(
                f"no checkpoint in {folder} is the best yet: that takes an epoch with validation images (data.validation)"
            )
        names |= {"best": best, "": found[0] if best is None else best}
    if str(which) not in names:
        raise ValueError(
            f"there is no checkpoint {which!r} in {folder}: give latest, best, or one of {', '.join(map(str, found))}"
        )
    return names[str(which)]


def read_metadata(folder, step: int) -> dict:
    """The metadata of a checkpoint. Raises ValueError, naming the file, unless every file is as it was saved."""
    path = absolute(folder) / str(step)
    if (path / "about").exists():
        raise ValueError(f"checkpoint {step} in {folder} {OLD_FORMAT}")
    file = path / DIGESTS
    try:
        if file in path.iterdir():  # a run killed before it wrote the list leaves a good checkpoint
            for name, digest in json.loads(file.read_text()).items():
                file = path / name
                if _sha256(file) != digest:
                    raise ValueError("not as it was saved")
        file = path / "metadata" / "metadata"
        return json.loads(file.read_text())
    except Exception as error:  # damage can raise almost anything
        raise ValueError(f"checkpoint {step} is damaged: {file} ({describe_error(error)})") from error


def latest_metadata(folder) -> dict | None:
    """The metadata of the latest undamaged checkpoint; None if there is none."""
    return next((metadata for _, metadata in _undamaged(folder)), None)


def check_same_data(stored: dict, metadata: dict) -> None:
    """Raise OSError if a checkpoint's metadata differ from `metadata` anywhere but in the config."""
    for name, value in metadata.items():
        if name != "config" and stored.get(name) != json.loads(json.dumps(value)):
            raise OSError(
                f"{name} is not what it was when checkpoint {stored['step']} was saved: give the same data, or name another --workdir"
            )


def restore_variables(folder, step: int, like: Any) -> dict:
    """The evaluated variables of a checkpoint, NumPy arrays in the shapes of `like`. Raises ValueError for damage and misfits."""
    return _restore(folder, step, "variables", like)


def absolute(folder):
    """The absolute path, which Orbax needs. `resolve` would make a gs:// path a local one."""
    path = epath.Path(folder)
    return path if path.is_absolute() else path.resolve()


def _restore(folder, step, item, like):
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    try:
        handler = ocp.CompositeCheckpointHandler(
            composite_options=ocp.CompositeOptions(multiprocessing_options=PRIMARY)
        )
        with ocp.Checkpointer(handler, multiprocessing_options=PRIMARY) as checkpointer:
            args = ocp.args.Composite(**{item: ocp.args.StandardRestore(like)})
            tree = checkpointer.restore(absolute(folder) / str(step), args=args)[item]
    except Exception as error:  # damage can raise almost anything
        raise ValueError(f"checkpoint {step} cannot be read ({describe_error(error)})") from error
    for (name, leaf), wanted in zip(_named_leaves(tree), jax.tree.leaves(like)):
        if leaf.shape != wanted.shape or leaf.dtype != wanted.dtype:
            raise ValueError(
                f"checkpoint {step} is of another model: {name} is {leaf.shape} there, {wanted.shape} here"
            )
    return tree


def _named_leaves(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _undamaged(folder) -> Iterator[tuple[int, dict]]:
    """Step and metadata of each undamaged checkpoint, latest first."""
    for step in steps(folder):
        try:
            metadata = read_metadata(folder, step)
        except ValueError:
            continue
        yield step, metadata


def _read_costs(folder):
    """{step: cost} of the undamaged checkpoints that have one."""
    return {step: metadata["cost"] for step, metadata in _undamaged(folder) if metadata.get("cost") is not None}


def _lowest(costs):
    """The step of lowest cost, the first one on a tie; None if there is none."""
    return min(costs, key=lambda step: (costs[step], step), default=None)


def _write_digests(path):
    """List the SHA-256 of every file of a checkpoint, atomically."""
    digests = {str(file.relative_to(path)): _sha256(file) for file in _files(path)}
    part = path / f"{DIGESTS}.tmp"
    part.write_text(json.dumps(digests, indent=1))
    part.rename(path / DIGESTS)


def _files(path):
    for child in path.iterdir():  # epath's `walk` returns paths without gs://
        yield from _files(child) if child.is_dir() else [child]


def _sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()
