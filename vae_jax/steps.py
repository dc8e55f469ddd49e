"""One step of training and of evaluation: pure functions, neither jitted nor mapped, for any objective."""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Key

from vae_jax.objectives import Batch, example_keys

# What takes the place of the step in keys that must not depend on it; no training reaches these numbers.
PURPOSES = {"evaluation": 2**32 - 1, "init": 2**32 - 2, "samples": 2**32 - 3}


@flax.struct.dataclass
class TrainState:
    """All that a training step reads and writes; data only. For several seeds each leaf has the seeds in front."""

    step: Any  # int32
    params: Any
    model_state: Any  # BatchNorm's running statistics; empty for the VAE
    opt_state: Any
    key: Any  # the root of all noise; never changes
    average: Any = None  # of the variables over the steps, where that is published

    @property
    def variables(self) -> dict:
        """What is trained."""
        return {"params": self.params, **self.model_state}

    @property
    def published(self) -> dict:
        """What is evaluated, and saved for inference."""
        return self.variables if self.average is None else self.average


def fixed_key(key: Key[Array, ""], purpose: str) -> Key[Array, ""]:
    """The key for one of `PURPOSES`, derived from a run's root key."""
    return jax.random.fold_in(key, PURPOSES[purpose])


def init_state(
    variables: dict,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    average: float = 0.0,
) -> TrainState:
    """The state before the first step, from a module's `init` variables; `average` as in `make_train_step`."""
    model_state = {name: value for name, value in variables.items() if name != "params"}
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        model_state=model_state,
        opt_state=optimizer.init(params),
        key=key,
        average=jax.tree.map(jnp.copy, variables) if average else None,
    )


def make_train_step(
    objective: Callable,
    optimizer: optax.GradientTransformation,
    axis_name: str | None = None,
    average: float = 0.0,
) -> Callable[[TrainState, Batch], tuple[TrainState, dict]]:
    """`train_step(state, batch) -> (state, metrics)`: one gradient step on the weighted mean of the loss.

    Metrics are the weighted means of the objective's, and `grad_norm`. Under `pmap`, `vmap` or
    `shard_map(check_vma=False)` give `axis_name`: sums and gradients are then added over that axis before they are divided by the summed weight.

    With `average` above 0, `state.average` is the exponential moving average of the variables (Polyak & Juditsky 1992),
    average <- d average + (1 - d) variables with d = min(average, (1 + t) / (10 + t)) at the t-th step, so that it forgets where it began.
    """

    def train_step(state, batch):
        keys = example_keys(state.key, state.step, batch.index)

        def summed_loss(params):
            variables = {"params": params, **state.model_state}
            metrics, model_state = objective(
                variables, batch, keys, train=True, axis_name=axis_name
            )
            return jnp.sum(batch.weight * metrics["loss"]), (metrics, model_state)

        grads, (metrics, model_state) = jax.grad(summed_loss, has_aux=True)(
            state.params
        )
        metrics = {
            name: jnp.sum(batch.weight * value) for name, value in metrics.items()
        }
        weight = jnp.sum(batch.weight)
        if axis_name is not None:
            grads, metrics, weight = lax.psum((grads, metrics, weight), axis_name)
        grads, metrics = jax.tree.map(lambda total: total / weight, (grads, metrics))

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics["grad_norm"] = optax.tree.norm(grads)
        state = state.replace(
            step=state.step + 1,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
        )
        if average:
            decay = jnp.minimum(average, (1 + state.step) / (10 + state.step))
            state = state.replace(
                average=optax.incremental_update(
                    state.variables, state.average, 1 - decay
                )
            )
        return state, metrics

    return train_step


def jit_train_step(
    objective: Callable, optimizer: optax.GradientTransformation
) -> Callable:
    """`make_train_step`, jitted for one device. The state given is donated: use only the one returned."""
    return jax.jit(make_train_step(objective, optimizer), donate_argnums=0)


def make_eval_step(
    objective: Callable,
) -> Callable[[dict, Batch, Key[Array, ""]], dict]:
    """`eval_step(variables, batch, key) -> metrics`, one value an example; the same key gives the same numbers."""

    def eval_step(variables, batch, key):
        keys = example_keys(key, PURPOSES["evaluation"], batch.index)
        metrics, _ = objective(variables, batch, keys, train=False)
        return metrics

    return eval_step


def make_adam(
    steps: int,
    batch_size: int = 1,
    *,
    learning_rate: float = 0.001,
    base_batch_size: int = 0,
    scaling: str = "sqrt",
    schedule: str = "constant",
    warmup: float = 0.0,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015).

    Args:
        steps: length of the training.
        batch_size: of all devices together.
        learning_rate: the highest rate.
        base_batch_size: the batch size that the rate is for; for another one it is scaled. 0: it is taken as it is.
        scaling: how it grows with the batch: "sqrt", by the root of the ratio (Krizhevsky 2014; for Adam Malladi et al.
            2022, whose rule also moves beta1, beta2 and eps, which stay here), or "linear" (Goyal et al. 2017, for SGD).
        schedule: "constant"; "cosine": falls to zero along half a cosine (Loshchilov & Hutter 2017); or "onecycle": rises
            from a 25th to the highest and falls to almost nothing, each along half a cosine (Smith & Topin 2018).
        warmup: share of the steps, in [0, 1), in which the rate rises; linearly from zero, if not of "onecycle".
        beta1: decay of the moving average of gradients; the post's gradient decay factor (its Table 3).
        beta2: decay of the moving average of squared gradients.
        eps: added to the root of the latter.
        weight_decay: each step also shrinks every parameter by this times the rate (AdamW, Loshchilov & Hutter 2019).

    Raises ValueError for a value out of range.
    """
    for name, value in [("learning_rate", learning_rate), ("eps", eps)]:
        if not 0 < value < math.inf:
            raise ValueError(f"optimizer.{name} is {value}, but must be above 0")
    for name, value in [("warmup", warmup), ("beta1", beta1), ("beta2", beta2)]:
        if not 0 <= value < 1:
            raise ValueError(f"optimizer.{name} is {value}, but must lie in [0, 1)")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(
            f"optimizer.weight_decay is {weight_decay}, but must be at least 0"
        )
    if base_batch_size < 0:
        raise ValueError(
            f"optimizer.base_batch_size is {base_batch_size}, but must be at least 0"
        )
    if scaling not in SCALINGS:
        raise ValueError(
            f"optimizer.scaling is {scaling!r}, but must be one of {', '.join(SCALINGS)}"
        )
    if base_batch_size:
        learning_rate *= SCALINGS[scaling](batch_size / base_batch_size)
    if schedule not in SCHEDULES:
        raise ValueError(
            f"optimizer.schedule is {schedule!r}, but must be one of {', '.join(SCHEDULES)}"
        )
    rate = SCHEDULES[schedule](learning_rate, steps, warmup)
    if not weight_decay:
        return optax.adam(rate, beta1, beta2, eps)
    return optax.adamw(rate, beta1, beta2, eps, weight_decay=weight_decay)


def warmed_up(schedule: Callable) -> Callable:
    """`schedule(rate, steps)`, after a linear rise from zero in the first share `warmup` of the steps."""

    def make_schedule(rate, steps, warmup):
        rising = math.floor(warmup * steps)
        falling = schedule(rate, steps - rising)
        if not rising:
            return falling
        return optax.join_schedules(
            [optax.linear_schedule(0.0, rate, rising), falling], [rising]
        )

    return make_schedule


def averaging(*, average: float = 0.0) -> float:
    """The part of the optimizer section that `make_train_step` takes.

    Args:
        average: decay of the moving average of the weights that is evaluated and published, in [0, 1); 0 publishes the weights themselves.

    Raises ValueError for a value out of range.
    """
    if not 0 <= average < 1:
        raise ValueError(f"optimizer.average is {average}, but must lie in [0, 1)")
    return average


SCHEDULES = {
    "constant": warmed_up(lambda rate, steps: optax.constant_schedule(rate)),
    "cosine": warmed_up(optax.cosine_decay_schedule),
    "onecycle": lambda rate, steps, warmup: optax.cosine_onecycle_schedule(
        steps, rate, warmup
    ),
}

SCALINGS = {"sqrt": math.sqrt, "linear": float}

OPTIMIZERS = {"adam": make_adam}
