"""Optimizers and learning-rate schedules, as optax transformations."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax


def make_adam(
    steps: int,
    batch_size: int = 1,
    groups: Sequence[str] = (),
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
    clip_norm: float = 0.0,
    boundaries: tuple[float, ...] = (),
    factors: tuple[float, ...] = (),
    rate_multipliers: tuple[float, ...] = (),
) -> optax.GradientTransformation:
    """Adam (Kingma & Ba 2015), with a separate optimizer for each group of parameters if there are groups.

    Args:
        steps: number of training steps.
        batch_size: total over all devices.
        groups: top-level entries of the parameters.
        learning_rate: peak learning rate.
        base_batch_size: batch size for which the rate was chosen; the rate is scaled for others. 0: no scaling.
        scaling: "sqrt", by the square root of the ratio of batch sizes (Krizhevsky 2014; for Adam Malladi et al. 2022,
            who also scale beta1, beta2 and eps, which are not scaled here), or "linear" (Goyal et al. 2017, for SGD).
        schedule: "constant"; "cosine", which falls to zero along half a cosine (Loshchilov & Hutter 2017); "onecycle",
            which rises from 1/25 of the rate during the warm-up and then falls to almost zero, along half cosines
            (Smith & Topin 2018); or "piecewise", which multiplies the rate by one of `factors` at each boundary.
        warmup: share of the steps, in [0, 1), during which the rate rises: linearly from zero, except for "onecycle".
        beta1: decay of the moving average of gradients; the post's gradient decay factor (its Table 3).
        beta2: decay of the moving average of squared gradients.
        eps: added to the square root of that average.
        weight_decay: each step also shrinks every parameter by this times the rate (AdamW, Loshchilov & Hutter 2019).
        clip_norm: global norm to which larger gradients of a step, or of a group, are scaled down; 0: no clipping.
        boundaries: for "piecewise": increasing shares, in (0, 1), of the steps after the warm-up.
        factors: for "piecewise": one for each boundary.
        rate_multipliers: multiplier of the rate for each network in the family's GROUPS, in that order; empty: all 1.

    Raises ValueError for a value out of range.
    """
    check(
        ("eps", eps, 0 < eps < math.inf, "above 0"),
        ("beta1", beta1, 0 <= beta1 < 1, "in [0, 1)"),
        ("beta2", beta2, 0 <= beta2 < 1, "in [0, 1)"),
        ("weight_decay", weight_decay, 0 <= weight_decay < math.inf, "at least 0"),
        ("clip_norm", clip_norm, 0 <= clip_norm < math.inf, "at least 0"),
    )
    learning_rate *= scale_of_rate(batch_size, base_batch_size, scaling)

    def make_one(share: float) -> optax.GradientTransformation:
        rate = make_schedule(steps, share * learning_rate, schedule, warmup, boundaries, factors)
        return adam_with(rate, beta1, beta2, eps, weight_decay, clip_norm)

    return by_group(make_one, groups, rate_multipliers)


def scale_of_rate(batch_size: int, base_batch_size: int, scaling: str) -> float:
    """By what the learning rate is multiplied; arguments as in `make_adam`. Raises ValueError for a value out of range."""
    check(
        ("base_batch_size", base_batch_size, base_batch_size >= 0, "at least 0"),
        ("scaling", scaling, scaling in SCALINGS, f"one of {', '.join(SCALINGS)}"),
        ("scaling", scaling, scaling == "sqrt" or base_batch_size > 0, "left out unless base_batch_size is above 0"),
    )
    return SCALINGS[scaling](batch_size / base_batch_size) if base_batch_size else 1.0


def adam_with(
    rate: optax.Schedule, beta1: float, beta2: float, eps: float, weight_decay: float, clip_norm: float
) -> optax.GradientTransformation:
    """Adam with a learning-rate schedule, and with weight decay and clipping unless they are 0."""
    adam = optax.adam(rate, beta1, beta2, eps)
    if weight_decay:
        adam = optax.adamw(rate, beta1, beta2, eps, weight_decay=weight_decay)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adam) if clip_norm else adam


def by_group(
    make_one: Callable[[float], optax.GradientTransformation], groups: Sequence[str], rate_multipliers: Sequence[float]
) -> optax.GradientTransformation:
    """`make_one(multiplier)` for each group, a top-level entry of the parameters; a single `make_one(1.0)` without
    groups.

    Raises ValueError unless the multipliers are one positive number for each group.
    """
    multipliers = rate_multipliers or (1.0,) * len(groups)
    rule = (
        f"one number above 0 for each of {', '.join(groups)}" if groups else "left out: this family has one optimizer"
    )
    holds = len(multipliers) == len(groups) and all(0 < multiplier < math.inf for multiplier in multipliers)
    check(("rate_multipliers", rate_multipliers, holds, rule))
    if not groups:
        return make_one(1.0)
    each = {group: make_one(multiplier) for group, multiplier in zip(groups, multipliers)}
    return optax.partition(each, lambda params: jax.tree_util.tree_map_with_path(lambda path, _: path[0].key, params))


def make_schedule(
    steps: int,
    learning_rate: float,
    schedule: str,
    warmup: float,
    boundaries: Sequence[float],
    factors: Sequence[float],
) -> optax.Schedule:
    """The learning rate as a function of the step; arguments as in `make_adam`. Raises ValueError for a value out of
    range.
    """
    matched = len(factors) == len(boundaries) and min(factors, default=1) > 0
    check(
        ("learning_rate", learning_rate, 0 < learning_rate < math.inf, "above 0"),
        ("warmup", warmup, 0 <= warmup < 1, "in [0, 1)"),
        ("schedule", schedule, schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
        ("boundaries", boundaries, is_increasing((0.0, *boundaries, 1.0)), "increasing numbers in (0, 1)"),
        ("factors", factors, matched, "one number above 0 for each boundary"),
        ("boundaries", boundaries, not boundaries or schedule == "piecewise", "left out unless schedule is piecewise"),
    )
    return SCHEDULES[schedule](learning_rate, steps, warmup, dict(zip(boundaries, factors)))


def check(*fields: tuple[str, Any, bool, str]) -> None:
    """Raise ValueError for the first violated rule; each field is (name, value, whether its rule holds, rule)."""
    for name, value, holds, rule in fields:
        if not holds:
            raise ValueError(f"optimizer.{name} is {value!r}, but must be {rule}")


def is_increasing(values: Sequence[float]) -> bool:
    """Whether the values strictly increase."""
    return all(before < after for before, after in itertools.pairwise(values))


def piecewise(rate: float, steps: int, cuts: Mapping[float, float]) -> optax.Schedule:
    """`rate` times the factors of all boundaries passed so far; `cuts` is {boundary as a share of the steps: factor}."""
    at: dict[int, float] = {}
    for share, factor in cuts.items():
        step = round(share * steps)
        at[step] = at.get(step, 1.0) * factor
    return optax.piecewise_constant_schedule(rate, at)


def warmed_up(schedule: Callable[..., optax.Schedule]) -> Callable[..., optax.Schedule]:
    """Precede `schedule(rate, steps, cuts)` by a linear rise from zero over the first `warmup` share of the steps."""

    def with_warmup(rate, steps, warmup, cuts):
        rising = math.floor(warmup * steps)
        falling = schedule(rate, steps - rising, cuts)
        if not rising:
            return falling
        return optax.join_schedules([optax.linear_schedule(0.0, rate, rising), falling], [rising])

    return with_warmup


def ema(*, ema_decay: float = 0.0) -> float:
    """The field of the optimizer section that `make_train_step` takes.

    Args:
        ema_decay: decay, in [0, 1), of the moving average of the weights used for evaluation and inference; 0 uses the
            weights themselves.

    Raises ValueError for a value out of range.
    """
    if not 0 <= ema_decay < 1:
        raise ValueError(f"optimizer.ema_decay is {ema_decay}, but must lie in [0, 1)")
    return ema_decay


SCHEDULES = {
    "constant": warmed_up(lambda rate, steps, cuts: optax.constant_schedule(rate)),
    "cosine": warmed_up(lambda rate, steps, cuts: optax.cosine_decay_schedule(rate, steps)),
    "piecewise": warmed_up(piecewise),
    "onecycle": lambda rate, steps, warmup, cuts: optax.cosine_onecycle_schedule(steps, rate, warmup),
}
SCALINGS = {"sqrt": math.sqrt, "linear": float}
OPTIMIZERS = {"adam": make_adam}
