"""`--mode=evaluate --full`: all that is known about a trained VAE, each number beside its floor, its ceiling or its error.

What does not apply is left out with its reason. The numbers go to generated/evaluation-*.json, the figures beside them.
"""

import functools
import json
import sys
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vae_jax import figures, weights
from vae_jax.batch import Batch, Dataset, Split, example_keys, make_batch, mean_image, named_key
from vae_jax.evaluation.baselines import convert
from vae_jax.evaluation.latents import decompose_kl, principal_plane, probe_labels, standard_error
from vae_jax.evaluation.likelihood import (
    SAMPLES_AT_ONCE,
    TRUSTED,
    make_log_weight_at,
    make_log_weights,
    sandwich,
    simulate,
    summarize,
)
from vae_jax.evaluation.samples import (
    COVERAGE_K,
    Manifold,
    frechet_distance,
    manifold,
    memorisation,
    nearest,
    precision_recall_density_coverage,
)
from vae_jax.likelihoods import BINARY, DENSITY
from vae_jax.objectives import log_normal, reparameterize
from vae_jax.pretrained import BATCH_SIZE, WEIGHED, Pretrained, in_batches
from vae_jax.run.devices import Devices
from vae_jax.run.evaluate import as_seen, map_blocks, map_examples
from vae_jax.run.files import json_line, read_json_lines, save_figure, write_atomically

SIMULATED = 128  # images drawn from the model, for the sandwich
MOST_GENERATED = 10_000
PAIRS = 10  # of a generated image and the nearest training image that are shown


class Subject(NamedTuple):
    """What is evaluated: a model, and a split as the model sees it and as it is stored."""

    vae: Pretrained
    dataset: Dataset
    name: str  # of the split
    seen: Split
    stored: Split
    devices: Devices

    def encode(self, split: Split) -> dict[str, np.ndarray]:
        """Of each image: mean and logvar of q(z | x), a draw z, the KL, and its latents' where they have a closed form."""

        def measure(variables, batch, key):
            model = self.vae.model.of(batch)
            mean, logvar = model.encode(variables, batch.image)
            z = reparameterize(mean, logvar, example_keys(key, None, batch.index))
            found = {"mean": mean, "logvar": logvar, "z": z[0]}
            if model.prior.kl is None:
                return found | {"kl": (log_normal(z, mean, logvar) - model.prior.log_prob(variables, z))[0]}
            by_latent = model.prior.kl(variables, mean, logvar)
            return found | {"kl": by_latent.sum(axis=-1), "kl_by_latent": by_latent}

        return map_examples(measure, split, devices=self.devices)(self.vae.variables, self.root)

    def batch(self, start: int, count: int) -> Batch:
        """`count` images of the split as the model sees them, from a position on, and from the first one again after the last."""
        rows = jnp.asarray(np.arange(start, start + count) % len(self.seen.label))
        return make_batch(jnp.asarray(self.seen.image[rows]), jnp.asarray(self.seen.label[rows]), rows, rows)

    @property
    def root(self):
        return jax.random.key(self.vae.config["seed"])


def evaluate_fully(
    vae: Pretrained, dataset: Dataset, split: str, samples: int, count: int | None, folder: Path, prior: str = "model"
) -> dict[str, Any]:
    """Every number of a VAE on a split, under its name, and reasons in place of those that do not apply.

    Args:
        samples: draws of z for each image's likelihood.
        count: images of the split whose likelihood is estimated; by default 1,000, or all if there are fewer.
        prior: its name in the names of files.
        folder: where finished parts, figures and the numbers are kept; the same call continues an interrupted one.

    Raises ValueError for samples below 1, and if the split has fewer images than `count`.
    """
    stored = dataset.splits[split]
    size = len(stored.label)
    count = min(1000, size) if count is None else count
    if samples < 1:
        raise ValueError(f"--samples is {samples}, but must be at least 1")
    if not 1 <= count <= size:
        raise ValueError(f"--count is {count}, but {split} has {size} images: give 1 to {size}")
    seen = as_seen(stored, dataset.binarize, vae.config["seed"])
    subject = Subject(vae, dataset, split, seen, stored, Devices())
    name = f"evaluation-step{vae.step}-{split}-samples{samples}-count{count}" + (
        "" if prior == "model" else f"-{prior}"
    )
    codes = subject.encode(seen)
    numbers = likelihood_numbers(subject, samples, count, folder / f"{name}.jsonl")
    numbers |= latent_numbers(subject, codes)
    generated, pairs = generated_numbers(subject)
    numbers |= generated
    found = {f"{split}/{key}": value for key, value in numbers.items()}
    write_atomically(folder / f"{name}.json", json.dumps(found, indent=2) + "\n")
    title = f"{split} of {vae.title}"
    draw(subject, codes, numbers, f"Evaluation on {title}", folder / f"{name}.png")
    if pairs is not None:
        rows = ["generated", "nearest training image"]
        closest = figures.image_rows(
            pairs, rows, [str(i + 1) for i in range(pairs.shape[1])], f"Closest pairs: {title}"
        )
        save_figure(closest, folder / f"{name}-pairs.png")
    return found


def likelihood_numbers(subject: Subject, samples: int, count: int, path: Path) -> dict[str, Any]:
    """-log p(x) by importance sampling, what says whether to trust it, and the sandwich on simulated images."""
    vae, p_x = subject.vae, subject.vae.model.likelihood
    if p_x.support == BINARY and not subject.dataset.is_binary:
        return {"nll": "left out: a Bernoulli is no likelihood of grey pixels"}
    pixels = int(np.prod(vae.image_shape))
    each = weigh(subject, samples, count, path)
    nll = each["nll"] + pixels * p_x.constant
    ess, k_hat = each["effective_sample_size"], each["pareto_k"]
    numbers = {
        "nll": float(nll.mean()),
        "nll/standard_error": standard_error(nll) if count > 1 else "left out: one image has none",
        "nll/images": count,
        "nll/samples": samples,
    }
    if p_x.support != DENSITY:
        numbers["nll/bits_a_dimension"] = convert(numbers["nll"], "nats", pixels)["bits a dimension"]
    for name, values in each.items():
        if name.startswith("bound_"):
            fewer = name.removeprefix("bound_")
            numbers[f"nll/with_{fewer}_samples"] = float(values.mean()) + pixels * p_x.constant
    numbers |= {
        "effective_sample_size": float(np.median(ess)),
        "effective_sample_size/5_percent_quantile": float(np.quantile(ess, 0.05)),
        "effective_sample_size/share_below_5": float(np.mean(ess < 5)),
    }
    if np.isnan(k_hat).any():
        numbers["pareto_k"] = f"left out: {samples} samples are too few"
    else:
        numbers |= {"pareto_k": float(np.median(k_hat)), "pareto_k/share_above_0.7": float(np.mean(k_hat > TRUSTED))}
    if vae.model.probabilities is not None:
        known = subject.seen.label[:count]
        numbers["bayes_accuracy"] = float(np.mean(vae.predict(subject.seen.image[:count])[0] == known))
    lower, upper = simulated_bounds(subject, samples)
    return numbers | {
        "nll/simulated_images_at_most": float(-lower.mean()) + pixels * p_x.constant,
        "nll/simulated_images_at_least": float(-upper.mean()) + pixels * p_x.constant,
        "nll/sandwich_width": float(np.mean(upper - lower)),
        "nll/sandwich_width/standard_error": standard_error(upper - lower),
    }


def weigh(subject: Subject, samples: int, count: int, path: Path) -> dict[str, np.ndarray]:
    """What `summarize` keeps of the first `count` images; finished blocks are read from the JSON lines in `path`."""
    vae = subject.vae
    log_weights = make_log_weights(vae.model, samples, SAMPLES_AT_ONCE)

    def measure(variables, batch, key):
        return log_weights(variables, batch, example_keys(key, None, batch.index))

    few = Split(subject.seen.image[:count], subject.seen.label[:count])
    blocks = map_blocks(measure, few, batch_size=WEIGHED, devices=subject.devices, batches=1)
    rows = read_json_lines(path)
    done = sum(len(row["nll"]) for row in rows)
    label = f"likelihood of {count:,} images, {samples:,} samples each"
    with open(path, "a", encoding="utf-8") as file, progress(label, count, done) as bar:
        if done < count:
            for log_w in blocks(vae.variables, subject.root, done):
                row = {name: values.tolist() for name, values in summarize(log_w).items()}
                file.write(json_line(row))
                file.flush()
                rows.append(row)
                bar.update(len(log_w))
    return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


def progress(label: str, total: int, done: int = 0) -> tqdm:
    """A progress bar on a terminal; elsewhere one line."""
    shown = sys.stderr.isatty()
    if not shown:
        print(f"vae_jax: {label}", file=sys.stderr, flush=True)
    return tqdm(total=total, initial=done, desc=label, unit=" images", disable=not shown)


def simulated_bounds(subject: Subject, samples: int) -> tuple[np.ndarray, np.ndarray]:
    """`sandwich` of images that are drawn from the model."""
    vae = subject.vae
    batch = subject.batch(0, SIMULATED)

    @jax.jit
    def draw(variables, batch, key):
        return simulate(vae.model.of(batch), variables, key, SIMULATED)

    z, image = draw(vae.variables, batch, named_key(subject.root, "simulate"))
    batch = batch._replace(image=image)
    log_weights = jax.jit(make_log_weights(vae.model, samples, SAMPLES_AT_ONCE))
    at_truth = jax.jit(make_log_weight_at(vae.model))
    keys = example_keys(subject.root, None, jnp.arange(SIMULATED))
    parts = []
    with progress(f"likelihood of {SIMULATED} simulated images", SIMULATED) as bar:
        for start in range(0, SIMULATED, WEIGHED):
            rows = slice(start, start + WEIGHED)
            some = jax.tree.map(itemgetter(rows), batch)
            log_w = log_weights(vae.variables, some, keys[rows])
            true = at_truth(vae.variables, some, z[rows])
            parts.append(sandwich(np.asarray(log_w), np.asarray(true)))
            bar.update(WEIGHED)
    lower, upper = (np.concatenate(part) for part in zip(*parts))
    return lower, upper


def latent_numbers(subject: Subject, codes: dict[str, np.ndarray]) -> dict[str, Any]:
    """The parts of the KL, and how well the codes tell the labels."""
    numbers = decompose_kl(codes["z"], codes["mean"], codes["logvar"], codes["kl"], codes.get("kl_by_latent"))
    label, training = subject.stored.label, subject.dataset.splits["train"]
    if subject.name == "train":
        return numbers | {"linear_probe_accuracy": "left out: a probe is fitted to the training images"}
    if (label < 0).any() or (training.label < 0).any() or len(np.unique(training.label)) < 2:
        return numbers | {"linear_probe_accuracy": "left out: a probe needs labels of at least two classes"}
    seen = as_seen(training, subject.dataset.binarize, subject.vae.config["seed"])
    trained = subject.encode(seen)["mean"]
    return numbers | probe_labels((trained, training.label), (codes["mean"], label))


def generated_numbers(subject: Subject) -> tuple[dict[str, Any], np.ndarray | None]:
    """Distances between generated and real images in the pinned classifier's features, and the closest pairs with copies.

    Decoded means are compared with the images as stored, draws from p(x | z) with those that the model sees. Beside both stand
    the floor, training images in place of generated ones, and the mean training image as a collapsed model would give it.
    """
    vae, training = subject.vae, subject.dataset.splits["train"]
    classifier, variables = weights.pinned_classifier()
    if vae.image_shape != (28, 28, 1):
        return {"frechet_distance": "left out: the pinned classifier reads images of 28x28x1"}, None
    if len(subject.stored.label) <= COVERAGE_K:
        return {"frechet_distance": f"left out: {COVERAGE_K} neighbours need at least {COVERAGE_K + 1} images"}, None
    featurize = functools.partial(in_batches, functools.partial(jax.jit(classifier.features), variables))
    count = min(len(subject.stored.label), MOST_GENERATED)
    print(f"vae_jax: {count:,} generated images", file=sys.stderr, flush=True)
    means, draws = generate(subject, count)
    average = np.broadcast_to(mean_image(training.image).astype(np.float32), means.shape)
    of_training, of_means = featurize(as_floats(training.image)), featurize(means)
    real = manifold(featurize(as_floats(subject.stored.image[:count])))
    numbers = (
        {"generated_images": count} | compare(real, of_means, "") | compare(real, featurize(average), "/collapsed")
    )
    if subject.dataset.binarize == "none":
        numbers |= compare(real, featurize(draws), "/draws")
    else:
        binary = manifold(featurize(as_floats(subject.seen.image[:count])))
        numbers |= compare(binary, featurize(draws), "/draws")
        seen = as_seen(
            Split(training.image[:count], training.label[:count]), subject.dataset.binarize, vae.config["seed"]
        )
        numbers |= compare(binary, featurize(as_floats(seen.image)), "/draws/floor")
    if subject.name == "train":
        return numbers | {"nearest_training_distance": "left out: the training images themselves are evaluated"}, None
    numbers |= compare(real, of_training[:count], "/floor")
    distance, which = nearest(of_means, of_training)
    numbers |= memorisation(distance, nearest(real.points, of_training)[0])
    worst = np.argsort(distance)[:PAIRS]
    return numbers, np.stack([means[worst], as_floats(training.image[which[worst]])])


def as_floats(image: np.ndarray) -> np.ndarray:
    """Stored bytes as floats in [0, 1]."""
    return image / np.float32(255)


def generate(subject: Subject, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The mean images of `count` draws z ~ p(z), and a draw from p(x | z) of each, cut to [0, 1].

    A conditional model has the conditions of the split's images.
    """
    vae = subject.vae

    @jax.jit
    def some(key, batch):
        model = vae.model.of(batch)
        raw = model.decode_raw(vae.variables, model.prior.sample(vae.variables, key, BATCH_SIZE))
        drawn = model.likelihood.sample(vae.variables, jax.random.fold_in(key, 0), raw)
        return model.likelihood.mean(vae.variables, raw), drawn.clip(0, 1)

    root = named_key(subject.root, "generate")
    keys = jax.random.split(root, -(-count // BATCH_SIZE))
    batches = (subject.batch(i * BATCH_SIZE, BATCH_SIZE) for i in range(len(keys)))
    means, draws = zip(*(jax.device_get(some(key, batch)) for key, batch in zip(keys, batches)))
    return np.concatenate(means)[:count], np.concatenate(draws)[:count]


def compare(real: Manifold, fake: np.ndarray, suffix: str) -> dict[str, Any]:
    """All distances between two sets of features, or the reason for leaving one out."""
    numbers: dict[str, Any] = {}
    try:
        numbers["frechet_distance"] = frechet_distance(real.points, fake)
    except ValueError as error:
        numbers["frechet_distance"] = f"left out: {error}"
    numbers |= precision_recall_density_coverage(real, manifold(fake))
    return {f"{name}{suffix}": value for name, value in numbers.items()}


def draw(subject: Subject, codes: dict[str, np.ndarray], numbers: dict[str, Any], title: str, path: Path) -> None:
    """One picture of the likelihood's curve, the latents and the reconstruction errors."""
    image = as_floats(subject.seen.image)
    label = {"label": subject.seen.label} if subject.vae.model.condition_on == "label" else {}
    error = np.mean((image - subject.vae.reconstruct(image, **label)) ** 2, axis=(1, 2, 3))
    curve = {int(name.split("_")[1]): value for name, value in numbers.items() if name.startswith("nll/with_")} | (
        {numbers["nll/samples"]: numbers["nll"]} if "nll/samples" in numbers else {}
    )
    variance = codes["mean"].var(axis=0, dtype=np.float64)
    planes = {
        f"PCA of the {what}": principal_plane(codes[part])
        for what, part in (("means", "mean"), ("log-variances", "logvar"))
    }
    save_figure(figures.evaluation(curve, variance, error, planes, subject.stored.label, title), path)
