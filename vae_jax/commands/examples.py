"""The model and the images that a mode works on: a split of the run's data, or the user's own images (`--input`)."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from vae_jax import data
from vae_jax.batch import Dataset, Split
from vae_jax.pretrained import Pretrained, load
from vae_jax.pretrained.arguments import check_all_labelled
from vae_jax.run.config import bind
from vae_jax.run.evaluate import as_seen
from vae_jax.run.job import fingerprint

LONGEST = 40  # bytes of a part of a file name


def shortened(part: str) -> str:
    """A part of a file name, or its digest if it is long."""
    return part if len(part) <= LONGEST else hashlib.sha256(part.encode()).hexdigest()[:8]


class Examples(NamedTuple):
    """The images that a mode works on, as the model sees them.

    Attributes:
        title: what the images are, for people.
        file: what the images are, for file names; it contains everything that determines them.
        names: one name per image; in a split, its position.
        notes: what was done to the images, in words.
    """

    image: UInt8[np.ndarray, "n height width channel"]
    label: Int[np.ndarray, " n"]
    title: str
    file: str
    names: list[str]
    notes: tuple[str, ...] = ()

    def at(self, position: int | np.integer) -> str:
        """The image at `position`, for file names."""
        return f"{self.file}-{position}"


def load_examples(
    workdir: str, config: dict, checkpoint: str, split: str, own: str | None, decodes: bool = True
) -> tuple[Pretrained, Examples]:
    """Load a run's model, with encoder and decoder, and a split of its data or the images at the path `own`.

    `decodes` says that the mode also decodes, for which a model of labels needs each image's label.
    """

    def needs_labels(vae):
        return vae.model.condition_on == "label" and (decodes or vae.model.encoder_takes_label)

    if own is None:
        vae, dataset = load_with_data(workdir, config, checkpoint)
        seen = as_seen(choose_split(dataset, split), dataset.binarize, config["seed"])
        if needs_labels(vae):
            check_all_labelled(split, seen.label)
        names = [str(i) for i in range(len(seen.label))]
        return vae, Examples(*seen, title=split, file=split, names=names)
    vae = load_able(workdir, checkpoint, encode="encoder", decode_raw="decoder")
    examples = (read_unlabelled if needs_labels(vae) else read_own)(vae, own)
    seen = as_seen(Split(examples.image, examples.label), vae.config["data"]["binarize"], vae.config["seed"])
    return vae, examples._replace(image=seen.image)


def read_unlabelled(vae: Pretrained, path: str) -> Examples:
    """`read_own` for a model that needs no label. Raises ValueError for one that does."""
    if vae.model.condition_on == "label":
        raise ValueError("--input gives images without labels, but this model is conditioned on them: leave it out")
    return read_own(vae, path)


def check_has_latents(vae: Pretrained) -> None:
    """Raise ValueError for a regression."""
    if not vae.model.latent_dim:
        raise ValueError("this model is a regression: it has no latents, which this mode needs")


def read_own(model: Pretrained, path: str) -> Examples:
    """Read images, prepared like those that the model was trained on. Raises ValueError if they do not fit it."""
    height, width, channels = model.image_shape
    section = model.config["data"]
    wanted = data.Preparation(section.get("size", 0), "grey" if channels == 1 else "colour")
    names, image, notes = data.read_images(path, wanted, section.get("skip_unreadable", False))
    if image.shape[1:] != model.image_shape:
        raise ValueError(
            f"{path} does not fit the model: images of {image.shape[2]}x{image.shape[1]}, but it "
            f"takes {width}x{height}, and it was trained without data.size, so images are not scaled: resize them"
        )
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape") + image.tobytes()).hexdigest()[:8]
    first = Path(path.partition(",")[0])
    return Examples(
        image,
        label=np.full(len(image), -1, np.int32),
        title=Path(path).name if "," not in path else f"{first.name}, ...",
        file=f"{os.fsencode(first.stem)[:LONGEST].decode(errors='ignore')}-{digest}",
        names=names,
        notes=(f"the images of {path}: {'; '.join(notes)}",) if notes else (),
    )


def load_able(workdir: str, checkpoint: str, **needed: str) -> Pretrained:
    """Load a model that has the functions that a mode needs: {function: what it is called}."""
    return check_able(load(workdir, checkpoint), workdir, **needed)


def check_able(pretrained: Pretrained, workdir: str, **needed: str) -> Pretrained:
    """Return the model. Raises ValueError if it lacks a function that a mode needs."""
    try:
        for function, what in needed.items():
            pretrained.check_has(function, what)
    except ValueError as error:
        raise ValueError(f"this mode does not fit the run in {workdir}: {error}") from None
    return pretrained


def load_with_data(workdir: str, config: dict, checkpoint: str) -> tuple[Pretrained, Dataset]:
    """Load a run's model, with encoder and decoder, and the data that it was trained on."""
    vae = load_able(workdir, checkpoint, encode="encoder", decode_raw="decoder")
    dataset = bind("data", data.load, config["data"])()
    check_trained_on(vae.data, fingerprint(dataset))
    return vae, dataset


def check_trained_on(expected: dict, found: dict) -> None:
    """Raise ValueError if the data's fingerprint differs from that of the model's training data."""
    if found != expected:
        raise ValueError("the data are not those that the model was trained on: bring those back, or train again")


def choose_split(dataset: Dataset, split: str) -> Split:
    """A split by its name. Raises ValueError for an unknown name."""
    if split not in dataset.splits:
        raise ValueError(f"there is no split {split!r}: this run has {', '.join(dataset.splits)}")
    return dataset.splits[split]


def choose_images(
    examples: Split | Examples, split: str, count: int, images: list[int] | None, labels: list[int] | None
) -> np.ndarray:
    """Choose `count` positions in a split: the given ones, the first image of each given label, or the first ones."""
    if images is not None and labels is not None:
        raise ValueError("--images and --labels are both given: give one of them")
    if images is None and labels is None:
        images = list(range(count))
    name, given = ("--images", images) if labels is None else ("--labels", labels)
    if len(given) != count:
        raise ValueError(f"{name} has {len(given)} entries, but this mode takes {count}")
    if images is not None:
        for index in images:
            if not 0 <= index < len(examples.label):
                raise ValueError(f"there is no image {index} in {split}: it has 0 to {len(examples.label) - 1}")
        return np.array(images)
    for label in labels:
        if label < 0 or label not in examples.label:
            known = [str(known) for known in np.unique(examples.label) if known >= 0]
            has = f"it has {', '.join(known)}" if known else "it is unlabelled"
            raise ValueError(f"there is no image labelled {label} in {split}: {has}")
    return np.array([np.argmax(examples.label == label) for label in labels])
