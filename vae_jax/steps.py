"""One step of training and of evaluation for any objective: pure functions, neither jitted nor mapped."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Key

from vae_jax.batch import Batch, example_keys, make_batch
from vae_jax.objectives import Objective


@flax.struct.dataclass
class TrainState:
    """Everything that a training step reads and writes; data only. With several seeds each leaf has a leading seed
    axis.
    """

    step: Any  # int32
    params: Any
    model_state: Any  # such as BatchNorm's running statistics; {} if the model has no state
    opt_state: Any
    key: Any  # the root of all noise; never changes
    ema: Any = None  # moving average of the variables, if `ema_decay` is above 0

    @property
    def variables(self) -> dict:
        """The trained parameters and the model state, as Flax variables."""
        return {"params": self.params, **self.model_state}

    @property
    def eval_variables(self) -> dict:
        """The variables for evaluation and inference: the moving average if there is one."""
        return self.variables if self.ema is None else self.ema


class Total(NamedTuple):
    """The weighted sum of a metric over examples, and the sum of the weights."""

    total: Any  # float32
    weight: Any  # float32

    @property
    def mean(self):
        """The weighted mean."""
        return self.total / self.weight


def total(value: Any, weight: Float[Array, " batch"]) -> Total:
    """The sum of a metric, `value` or `(value, own weight)`, over the examples of a batch."""
    if isinstance(value, tuple):
        value, own = value
        weight = weight * own
    return Total(jnp.sum(weight * value), jnp.sum(weight))


def init_state(
    variables: dict,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    ema_decay: float = 0.0,
) -> TrainState:
    """The state before the first step. `variables` come from a model's `init`; `ema_decay` is as in `make_train_step`."""
    model_state = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        key=key,
        ema=jax.tree.map(jnp.copy, variables) if ema_decay else None,
    )


def unchanged(batch: Batch, keys: Key[Array, " batch"]) -> Batch:
    """Return the batch unchanged."""
    return batch


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
    ema_decay: float = 0.0,
    prepare: Callable[[Batch, Key[Array, " batch"]], Batch] = unchanged,
    groups: Sequence[str] = (),
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Total]]]:
    """`train_step(state, batch) -> (state, metrics)`: one gradient step on the weighted mean of the loss.

    The metrics are `Total`s over the batch, one for each metric of the objective and one for `grad_norm`. For example,
    `metrics["loss"].mean` is the mean loss. Give `axis_name` under `pmap`, `vmap` or `shard_map(check_vma=False)`:
    gradients and totals are then summed over that axis before the gradients are divided by the summed weight.

    With `ema_decay` above 0, `state.ema` is the exponential moving average of the variables (Polyak & Juditsky 1992),

        ema <- d ema + (1 - d) variables,    d = min(ema_decay, (1 + t) / (10 + t)) at the t-th step,

    so that it forgets its initial value. `prepare(batch, keys)` returns the batch for the objective, for example with
    binary pixels. `groups` are top-level entries of the parameters; each adds a metric `grad_norm/GROUP`.
    """

    def train_step(state, batch):
        keys = example_keys(state.key, state.step, batch.index)
        batch = prepare(batch, keys)

        def summed_loss(params):
            variables = {"params": params, **state.model_state}
            metrics, model_state = objective(variables, batch, keys, True, state.step, axis_name)
            return jnp.sum(batch.weight * metrics["loss"]), (metrics, model_state)

        grads, (metrics, model_state) = jax.grad(summed_loss, has_aux=True)(state.params)
        totals = {name: total(value, batch.weight) for name, value in metrics.items()}
        if axis_name is not None:
            grads, totals = lax.psum((grads, totals), axis_name)
        grads = jax.tree.map(lambda leaf: leaf / totals["loss"].weight, grads)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        totals["grad_norm"] = Total(optax.tree.norm(grads), jnp.ones(()))
        for group in groups:
            totals[f"grad_norm/{group}"] = Total(optax.tree.norm(grads[group]), jnp.ones(()))
        state = state.replace(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
        )
        if ema_decay:
            decay = jnp.minimum(ema_decay, (1 + state.step) / (10 + state.step))
            ema = optax.incremental_update(state.variables, state.ema, 1 - decay)
            state = state.replace(ema=ema)
        return state, totals

    return train_step


def jit_train_step(
    objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Total]]]:
    """`make_train_step`, jitted for one device. The input state is donated: use only the returned one."""
    return jax.jit(make_train_step(objective, optimizer), donate_argnums=0)


def make_run_steps(
    train_step: Callable[[Any, Batch], Any], batch_size: int, max_steps: int, shards: int = 1
) -> Callable[..., Any]:
    """`run_steps(state, order, first, count, image, label, shard=0) -> (state, history)`, to be jitted.

    It runs the steps `first` to `first + count - 1` of an epoch. `order` holds the positions of the epoch's examples in
    the data set. `count` is at most `max_steps` and may differ between calls of one compiled program. `history` holds
    the metrics of each step, [max_steps]. Each batch is split into `shards` equal shards, and this call takes number
    `shard`; `train_step` must sum over the shards.

    If `image` and `label` are only a part of the data set, `order` is a pair `(order, place)`: the examples' positions
    in the data set, which determine their noise, and their positions in `image`.
    """
    share = batch_size // shards
    train_step = jax.jit(train_step)  # traced only once

    def run_steps(state, order, first, count, image, label, shard=0):
        order, place = order if isinstance(order, tuple) else (order, None)
        weight = jnp.ones(share)

        def one_step(i, carry):
            state, history = carry
            start = (first + i) * batch_size + shard * share
            index = rows = lax.dynamic_slice(order, (start,), (share,))
            if place is not None:
                rows = lax.dynamic_slice(place, (start,), (share,))
            batch = make_batch(image[rows], label[rows], weight, index)
            state, metrics = train_step(state, batch)
            return state, jax.tree.map(lambda values, value: values.at[i].set(value), history, metrics)

        any_rows = jnp.zeros(share, jnp.int32)
        shapes = jax.eval_shape(
            lambda: train_step(state, make_batch(image[any_rows], label[any_rows], weight, any_rows))[1]
        )
        history = jax.tree.map(lambda leaf: jnp.zeros(max_steps, leaf.dtype), shapes)
        return lax.fori_loop(0, count, one_step, (state, history))

    return run_steps


def eval_metrics(objective: Objective, variables: Any, batch: Batch, keys: Key[Array, " batch"]) -> dict:
    """The metrics of a batch in evaluation, one value per example, with the examples' own keys."""
    return objective(variables, batch, keys, False, None)[0]


def make_eval_step(
    objective: Objective,
) -> Callable[[dict, Batch, Key[Array, ""]], dict]:
    """`eval_step(variables, batch, key) -> metrics`, one value per example, deterministic for a given key."""

    def eval_step(variables, batch, key):
        return eval_metrics(objective, variables, batch, example_keys(key, None, batch.index))

    return eval_step
