"""The likelihood of a trained VAE by importance sampling, and diagnostics of its reliability."""

import functools
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vae_jax.batch import example_keys, named_key
from vae_jax.evaluation.baselines import convert
from vae_jax.evaluation.likelihood import (
    TRUSTED,
    WEIGHED,
    log_weight_at,
    make_log_weights,
    sandwich,
    simulate,
    summarize,
)
from vae_jax.evaluation.statistics import standard_error
from vae_jax.full_evaluation.subject import Subject
from vae_jax.likelihoods import BINARY, DENSITY
from vae_jax.run.evaluate import map_blocks
from vae_jax.run.files import json_line, read_json_lines, write_atomically

SIMULATED = 128  # images drawn from the model for `sandwich`


def likelihood_numbers(subject: Subject, samples: int, count: int, path: Path) -> dict[str, Any]:
    """-log p(x) by importance sampling, diagnostics of its reliability, and the `sandwich` bounds on simulated images."""
    vae, p_x = subject.vae, subject.vae.model.likelihood
    if p_x.support == BINARY and not subject.dataset.is_binary(subject.name):
        return {"nll": "left out: a Bernoulli is not a likelihood of grey pixels"}
    pixels = int(np.prod(vae.image_shape))
    each = weigh(subject, samples, count, path)
    nll = each["nll"] + pixels * p_x.constant
    ess, k_hat = each["effective_sample_size"], each["pareto_k"]
    numbers = {
        "nll": float(nll.mean()),
        "nll/standard_error": float(standard_error(nll)) if count > 1 else "left out: one image has none",
        "nll/images": count,
        "nll/samples": samples,
    }
    if p_x.support != DENSITY:
        numbers["nll/bits_per_dimension"] = convert(numbers["nll"], "nats", round(pixels * p_x.covered))[
            "bits per dimension"
        ]
    for name, values in each.items():
        if name.startswith("bound_"):
            fewer = name.removeprefix("bound_")
            numbers[f"nll/with_{fewer}_samples"] = float(values.mean()) + pixels * p_x.constant
    numbers |= {
        "effective_sample_size": float(np.median(ess)),
        "effective_sample_size/5_percent_quantile": float(np.quantile(ess, 0.05)),
        "effective_sample_size/share_below_5": float(np.mean(ess < 5)),
    }
    if np.isnan(k_hat).all():
        numbers["pareto_k"] = f"left out: {samples} samples are too few"
    else:
        median = float(np.median(k_hat))
        infinite = "infinite: one weight outweighs all others" if median > 0 else "left out: the weights are equal"
        numbers["pareto_k"] = median if np.isfinite(median) else infinite
        numbers["pareto_k/share_above_0.7"] = float(np.mean(k_hat > TRUSTED))
    if vae.model.probabilities is not None:
        image, known = subject.first(count)
        numbers["prediction_accuracy"] = float(np.mean(vae.predict(image)[0] == known))
    lower, upper = simulated_bounds(subject, samples)
    return numbers | {
        "nll/simulated_images_at_most": float(-lower.mean()) + pixels * p_x.constant,
        "nll/simulated_images_at_least": float(-upper.mean()) + pixels * p_x.constant,
        "nll/sandwich_width": float(np.mean(upper - lower)),
        "nll/sandwich_width/standard_error": float(standard_error(upper - lower)),
    }


def weigh(subject: Subject, samples: int, count: int, path: Path) -> dict[str, np.ndarray]:
    """The results of `summarize` for `subject.first(count)`. Finished blocks are read from the JSON lines in `path`."""
    vae = subject.vae
    log_weights = make_log_weights(vae.model, samples)
    blocks = map_blocks(log_weights, subject.first(count), batch_size=WEIGHED, devices=subject.devices)
    rows = read_json_lines(path, check_follows)
    done = sum(len(row["nll"]) for row in rows)
    write_atomically(path, "".join(map(json_line, rows)))  # without a line that a killed process left incomplete
    label = f"likelihood of {count:,} images, {samples:,} samples each"
    with open(path, "a", encoding="utf-8") as file, progress(label, count, done) as bar:
        for log_w in blocks(vae.variables, subject.root, done):
            row = {"first": done} | {name: values.tolist() for name, values in summarize(log_w).items()}
            done += len(log_w)
            file.write(json_line(row))
            file.flush()
            rows.append(row)
            bar.update(len(log_w))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0] if name != "first"}


def check_follows(row: dict, before: dict) -> None:
    """Raise ValueError unless a block of images begins where the one before ends; older versions did not say where."""
    end = before["first"] + len(before["nll"]) if before else 0
    if row.setdefault("first", end) != end:
        raise ValueError("a block is missing")


def progress(label: str, total: int, done: int = 0) -> tqdm:
    """A progress bar on a terminal, otherwise one printed line."""
    shown = sys.stderr.isatty()
    if not shown:
        print(f"vae_jax: {label}", file=sys.stderr, flush=True)
    return tqdm(total=total, initial=done, desc=label, unit=" images", disable=not shown)


def simulated_bounds(subject: Subject, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """The `sandwich` bounds for images drawn from the model."""
    vae = subject.vae
    batch = subject.batch(0, SIMULATED)

    @jax.jit
    def draw(variables, batch, key):
        return simulate(vae.model.of(batch), variables, key, SIMULATED)

    z, image = draw(vae.variables, batch, named_key(subject.root, "simulate"))
    batch = batch._replace(image=image)
    at_truth = jax.jit(functools.partial(log_weight_at, vae.model))
    keys = example_keys(subject.root, None, jnp.arange(SIMULATED))
    parts = []
    with progress(f"likelihood of {SIMULATED} simulated images", SIMULATED) as bar:
        for start in range(0, SIMULATED, WEIGHED):
            rows = slice(start, start + WEIGHED)
            some = jax.tree.map(itemgetter(rows), batch)
            log_w = vae.log_weights(samples)(vae.variables, some, keys[rows])
            true = at_truth(vae.variables, some, z[rows])
            parts.append(sandwich(np.asarray(log_w), np.asarray(true)))
            bar.update(WEIGHED)
    lower, upper = (np.concatenate(part) for part in zip(*parts))
    return lower, upper
