"""Images that a trained VAE generates, beside real ones."""

import functools
import sys
from typing import Any

import jax
import numpy as np

from vae_jax import weights
from vae_jax.batch import Split, mean_image, named_key
from vae_jax.evaluation.samples import (
    COVERAGE_K,
    Manifold,
    frechet_distance,
    manifold,
    memorisation,
    nearest,
    precision_recall_density_coverage,
)
from vae_jax.full_evaluation.subject import Subject, as_floats
from vae_jax.pretrained import BATCH_SIZE, in_batches
from vae_jax.run.evaluate import as_seen

MOST_GENERATED = 10_000
PAIRS = 10  # of a generated image and the nearest training image that are shown


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
