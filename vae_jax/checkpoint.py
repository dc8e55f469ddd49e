"""Checkpoints of a run by Orbax; the only file that knows it.

A checkpoint holds `state`, all that training needs to continue; `variables`, the published ones, which suffice for
inference; and `about`: the config, what the model was built for, the metric that the best one is chosen by. Since Orbax
does not notice a flipped bit, a list of its files' SHA-256 is kept with them.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import PreservationPolicy

from vae_jax.steps import TrainState

DIGESTS = "sha256.json"
HIGHER_IS_BETTER = ("accuracy",)  # of the other metrics the lowest is the best


class Checkpoints:
    """The checkpoints that a training writes: it keeps the latest ones and the best one.

    Args:
        folder: created if need be.
        about: stored with each, as JSON.
        keep: how many of the latest are kept.
        best: name of the metric that marks the best one, such as "validation/loss"; None: there is no best one.
    """

    def __init__(self, folder, about: dict, keep: int, best: str | None = None):
        self._folder = epath.Path(folder).absolute()
        self._about, self._best = about, best
        self._policy = _LatestAndBest(keep, _best_step(self._folder))
        options = ocp.CheckpointManagerOptions(
            create=True,
            cleanup_tmp_directories=True,
            enable_async_checkpointing=False,
            preservation_policy=self._policy,
        )
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def is_best(self, metrics: dict) -> bool:
        """Whether a checkpoint with these metrics would be the best one."""
        if self._best is None:
            return False
        best = self._policy.best
        return best is None or _cost(self._best, metrics) < _cost_of(self._folder, best)

    def save(self, step: int, state: TrainState, metrics: dict) -> None:
        """Write the checkpoint of `step`, whole or not at all; `metrics` are those of its evaluation, if there was one."""
        if self._best in metrics and self.is_best(metrics):
            self._policy.best = step
        taken = self._folder / str(step)
        if taken.exists():  # damaged: training has come here again from an earlier one
            taken.rename(self._folder / f"damaged-{step}")
            self._manager.reload()
        about = self._about | {
            "step": step,
            "best": {name: metrics[name] for name in metrics if name == self._best},
        }
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(_to_host(state)),
                variables=ocp.args.StandardSave(_to_host(state.published)),
                about=ocp.args.JsonSave(about),
            ),
        )
        text = json.dumps(_digests(self._folder / str(step)), indent=1)
        part = self._folder / str(step) / f"{DIGESTS}.tmp"
        part.write_text(text)
        part.rename(self._folder / str(step) / DIGESTS)

    def close(self) -> None:
        self._manager.close()


class _LatestAndBest(PreservationPolicy):
    def __init__(self, keep, best):
        self.keep, self.best = keep, best

    def should_preserve(self, checkpoints, *, context):
        latest = len(checkpoints) - self.keep
        return [
            i >= latest or info.step == self.best for i, info in enumerate(checkpoints)
        ]


def steps(folder) -> list[int]:
    """The steps of which `folder` holds checkpoints, the latest first."""
    folder = epath.Path(folder)
    found = ocp.utils.checkpoint_steps(folder) if folder.is_dir() else []
    return sorted(found, reverse=True)


def select(folder, which: str = "") -> int:
    """The step that `which` means: "best", "latest", a number, or "" for the best where there is one, else the latest.

    Raises ValueError if there is no such checkpoint.
    """
    found, best = steps(folder), _best_step(folder)
    if not found:
        raise ValueError(f"there is no checkpoint in {folder}: train first")
    if which == "best" and best is None:
        raise ValueError(
            f"none of the checkpoints in {folder} is the best: that takes validation images (data.validation)"
        )
    names = {"latest": found[0], "best": best, "": found[0] if best is None else best}
    names |= {str(step): step for step in found}
    if which not in names:
        raise ValueError(
            f"there is no checkpoint {which!r} in {folder}: give latest, best, or one of {', '.join(map(str, found))}"
        )
    return names[which]


def read_about(folder, step: int) -> dict:
    """What is stored about a checkpoint. Raises ValueError where it cannot be read."""
    path = epath.Path(folder) / str(step) / "about" / "metadata"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {step} is damaged: {path}") from error


def restore_variables(folder, step: int, like: Any) -> dict:
    """The published variables of a checkpoint, NumPy arrays of the shapes in `like`. Raises ValueError if it is damaged."""
    return _restore(folder, step, "variables", like)


def restore_states(folder, like: TrainState) -> Iterator[TrainState | ValueError]:
    """The states of the checkpoints, the latest first; a ValueError in the place of each damaged one.

    They have the shapes in `like`; all but the root key are NumPy arrays.
    """
    for step in steps(folder):
        try:
            state = _restore(folder, step, "state", jax.eval_shape(_plain, like))
        except ValueError as error:
            yield error
        else:
            yield state.replace(key=jax.random.wrap_key_data(state.key))


def _restore(folder, step, item, like):
    path = epath.Path(folder).absolute() / str(step)
    _check_files(path, step)
    like = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), like)
    try:
        with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
            args = {item: ocp.args.StandardRestore(like)}
            return checkpointer.restore(path, args=ocp.args.Composite(**args))[item]
    except Exception as error:  # damage shows as almost anything
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(f"checkpoint {step} cannot be read ({reason})") from error


def _check_files(path, step):
    """Raise ValueError if a file is not what was saved. A run killed before it could write the list has none."""
    try:
        expected = json.loads((path / DIGESTS).read_text())
    except FileNotFoundError:
        return
    except ValueError as error:
        raise ValueError(f"checkpoint {step} is damaged: {path / DIGESTS}") from error
    found = _digests(path)
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


def _cost(name, metrics):
    return -metrics[name] if name.endswith(HIGHER_IS_BETTER) else metrics[name]


def _cost_of(folder, step):
    """Infinite where the checkpoint has no metric, or cannot be read."""
    try:
        metrics = read_about(folder, step)["best"]
    except ValueError:
        return math.inf
    return min((_cost(name, metrics) for name in metrics), default=math.inf)


def _best_step(folder):
    costs = {step: _cost_of(folder, step) for step in steps(folder)}
    best = min(costs, key=costs.get, default=None)
    return None if best is None or costs[best] == math.inf else best


def _plain(tree):
    """Typed keys as the integers that they are: Orbax does not take them from several processes."""
    return jax.tree.map(
        lambda leaf: (
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        ),
        tree,
    )


def _to_host(tree):
    return jax.tree.map(np.asarray, jax.device_get(_plain(tree)))
