"""Optimizers and learning-rate schedules."""

import math
from collections.abc import Callable

import optax


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
        raise ValueError(f"optimizer.weight_decay is {weight_decay}, but must be at least 0")
    if base_batch_size < 0:
        raise ValueError(f"optimizer.base_batch_size is {base_batch_size}, but must be at least 0")
    if scaling not in SCALINGS:
        raise ValueError(f"optimizer.scaling is {scaling!r}, but must be one of {', '.join(SCALINGS)}")
    if base_batch_size:
        learning_rate *= SCALINGS[scaling](batch_size / base_batch_size)
    if schedule not in SCHEDULES:
        raise ValueError(f"optimizer.schedule is {schedule!r}, but must be one of {', '.join(SCHEDULES)}")
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
        return optax.join_schedules([optax.linear_schedule(0.0, rate, rising), falling], [rising])

    return make_schedule


def ema(*, ema_decay: float = 0.0) -> float:
    """The part of the optimizer section that `make_train_step` takes.

    Args:
        ema_decay: decay, in [0, 1), of the moving average of the weights that is evaluated and saved for inference; 0
            uses the weights themselves.

    Raises ValueError for a value out of range.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"optimizer.ema_decay is {ema_decay}, but must lie in [0, 1)")
    return ema_decay


SCHEDULES = {
    "constant": warmed_up(lambda rate, steps: optax.constant_schedule(rate)),
    "cosine": warmed_up(optax.cosine_decay_schedule),
    "onecycle": lambda rate, steps, warmup: optax.cosine_onecycle_schedule(steps, rate, warmup),
}
SCALINGS = {"sqrt": math.sqrt, "linear": float}
OPTIMIZERS = {"adam": make_adam}
