"""Design of the augmentation study: its arms, the images that each arm trains on, and their order."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax.batch import Dataset, Split
from vae_jax.data import own

PERCENTAGES = (1.0, 5.0, 20.0, 50.0, 100.0)  # of half B
MIN_PER_CLASS = 10  # real images per class that a default percentage must leave
CHOICE_PERCENTAGE = 20.0
SHARES = (0.5, 1.0)  # of the latents that get noise
SCALES = (0.25, 0.5, 1.0)  # standard deviations of the noise that the study chooses from
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # standard deviations in the figure
SHIFT, ROTATION = 2, 10.0  # pixels, degrees: the classical augmentation
SHARP_VAE = {"objective.beta": 0.02, "model.latent_dim": 32}  # config of arm h's VAE
MODELS = ("classifier", "vae", "sharp")  # run directories of the study
CONFIDENCE_THRESHOLD = 0.9  # lowest probability of a pseudo-label in arms h and i


class Arm(NamedTuple):
    """What the classifier trains on besides p % of half B."""

    label: str
    extra: str = ""  # the part of the pool to add, as many images as real ones
    augmented: bool = False  # shift and rotate all training images
    pseudo_labelled: bool = False  # add every image that arm c labels confidently

    @property
    def generated(self) -> bool:
        """Whether a VAE made some of the images."""
        return self.extra.startswith(("generated", "drawn"))


ARMS = {
    "a": Arm("real images"),
    "b": Arm("real images, each twice", "real"),
    "c": Arm("real images, shifted and rotated", augmented=True),
    "d": Arm("real + generated from A, A's labels (the post)", "generated from A"),
    "e": Arm("real + originals of A, A's labels", "originals of A"),
    "f": Arm("real + generated from the same real images", "generated from B"),
    "g": Arm("as f, shifted and rotated", "generated from B", True),
    "h": Arm("as c + drawn from A, pseudo-labelled", "drawn from A", True, True),
    "i": Arm("as c + originals of A, pseudo-labelled", "originals of A", True, True),
}
PAIRS = {
    "f-b": "generated images vs. repeated real images",
    "f-c": "generated images vs. shifts and rotations",
    "g-c": "generated images on top of shifts and rotations",
    "d-e": "generated images vs. their originals, both with A's labels",
    "h-c": "pseudo-labelled generated images on top of shifts and rotations",
    "h-i": "pseudo-labelled generated images vs. their originals",
}


class Pool(NamedTuple):
    """The images of all arms, one part after the other; arms differ in the rows they read."""

    image: jax.Array  # uint8 [images, height, width, channel]
    label: jax.Array
    start: dict[str, int]  # first row of each part


def make_pool(parts: dict[str, Split]) -> Pool:
    """Concatenate `parts` on the device."""
    sizes = [len(part.label) for part in parts.values()]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    image, label = (np.concatenate(arrays) for arrays in zip(*parts.values()))
    return Pool(*jax.device_put((image, label)), dict(zip(parts, starts)))


def stratified_order(label: np.ndarray, key: tuple[int, ...]) -> np.ndarray:
    """Permute all positions so that every prefix keeps the class proportions; a pure function of `key`."""
    rng = np.random.default_rng(key)
    place = np.empty(len(label))
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def halves(train: Split) -> list[Split]:
    """Halves A and B of the training images, the same for every seed."""
    order = stratified_order(train.label, (own.SPLIT_SEED, 0))
    middle = len(order) // 2
    parts = np.sort(order[:middle]), np.sort(order[middle:])
    return [Split(train.image[part], train.label[part]) for part in parts]


def training_rows(arm: Arm, pool: Pool, real: np.ndarray, sources: np.ndarray) -> np.ndarray:
    """Rows of the pool that an arm trains on.

    Args:
        real: positions of its real images in half B.
        sources: positions of its extra images in half A, if they come from there.
    """
    rows = pool.start["real"] + real
    if not arm.extra:
        return rows
    others = sources if arm.extra.endswith("A") else real
    if len(others) > len(real):  # repeat the real images: they stay half of the total
        rows = np.resize(rows, len(others))
    return np.concatenate([rows, pool.start[arm.extra] + others])


def replace_labels(label: jax.Array, part: slice, prediction: np.ndarray) -> jax.Array:
    """Replace the labels of `part` in the pool by each seed's predictions; returns [seeds, images]."""
    return jnp.tile(label, (len(prediction), 1)).at[:, part].set(prediction)


def reading_order(rows: np.ndarray, length: int, key: tuple[int, ...]) -> np.ndarray:
    """Concatenate random permutations of `rows`, cut to `length`."""
    rng = np.random.default_rng(key)
    rounds = [rng.permutation(rows) for _ in range(-(-length // len(rows)))]
    return np.concatenate(rounds)[:length].astype(np.int32)


def count_of(percentage: float, size: int) -> int:
    """The number of images that make up a percentage of `size`."""
    return round(percentage / 100 * size)


def choice_percentage(settings: dict) -> float:
    """The percentage of half B that arm f trains on while the noise is chosen."""
    return max(CHOICE_PERCENTAGE, min(settings["percentages"]))


def check_labelled(name: str, dataset: Dataset) -> None:
    """Raise ValueError if an image of the data set has no label."""
    if min(split.label.min() for split in dataset.splits.values()) < 0:
        raise ValueError(f"{name} has unlabelled images, but the study needs a label for each")


def check_percentages(given: list | None, size: int, num_classes: int) -> list[float]:
    """Check the percentages of a half with `size` images; the defaults leave MIN_PER_CLASS images per class.

    Raises ValueError for one that is not a number, lies outside (0, 100] or leaves less than one image per class.
    """
    if given is None:
        least = MIN_PER_CLASS * num_classes
        return [p for p in PERCENTAGES if p / 100 * size >= least] or [100.0]
    try:
        percentages = [float(item) for item in given or [""]]
    except ValueError:
        raise ValueError(f"--percentages is {','.join(given)!r}, but must be numbers separated by commas") from None
    for percentage in percentages:
        if not 0 < percentage <= 100:
            raise ValueError(f"--percentages has {percentage:g}, but must lie in (0, 100]")
        if (count := count_of(percentage, size)) < num_classes:
            raise ValueError(
                f"--percentages has {percentage:g}, which leaves {count} images of half B for {num_classes} classes: "
                f"give at least {100 * num_classes / size:.2g}"
            )
    return percentages
