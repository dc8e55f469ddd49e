"""What `--mode` does with a run directory once it holds a checkpoint: numbers and pictures of the trained model."""

import csv
import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from vae_jax import data, figures, generate
from vae_jax.batch import Dataset, Split
from vae_jax.objectives import kl_to_standard_normal
from vae_jax.pretrained import TrainedVAE, load, load_variables
from vae_jax.run.config import bind
from vae_jax.run.evaluate import make_evaluate
from vae_jax.run.files import local_path, save_figure, whole_file, write_whole
from vae_jax.run.seeds import over_seeds
from vae_jax.run.session import build, fingerprint

MOST_SHOWN = 100  # images beside their reconstructions
LIMIT = 3.0  # standard deviations of the prior that a traversal covers on either side


def evaluate(
    workdir: str, config: dict, checkpoint: str, split: str
) -> dict[str, float | int]:
    """The metrics of a checkpoint on a split, as training logged them; of the test split also what summary.md has."""
    about, variables = load_variables(workdir, checkpoint)
    job = build(config)
    check_trained_on(about["data"], job.about["data"])
    examples = choose_split(job.dataset, split)
    arrays = make_evaluate(job.objective, examples, job.map_seeds)(
        variables, job.root()
    )
    metrics = {
        f"{split}/{name}": value for name, value in over_seeds(arrays, job.seed).items()
    }
    numbers = {}
    if split == "test":
        _, numbers = job.reports(variables, {split: arrays}, history=[])
    return {"step": about["step"]} | metrics | numbers


def sample(workdir: str, checkpoint: str, count: int, seed: int) -> list[Path]:
    """Images decoded from the prior, as a grid and as .npz."""
    vae = load_model(workdir, checkpoint, "vae")
    image = vae.sample(count, seed)
    title = f"{count} images decoded from z ~ N(0, 1): {vae.title}"
    return save(
        workdir,
        f"sample-step{vae.step}-count{count}-seed{seed}",
        figures.image_grid(image, title),
        image=image,
    )


def reconstruct(
    workdir: str, config: dict, checkpoint: str, split: str, count: int
) -> list[Path]:
    """The first `count` images of a split beside their reconstructions."""
    vae, examples = load_with_split(workdir, config, checkpoint, split)
    most = min(MOST_SHOWN, len(examples.label))
    if count > most:
        raise ValueError(f"--count is {count}, but can be at most {most} for {split}")
    image, label = examples.image[:count], examples.label[:count]
    reconstruction = vae.reconstruct(image)
    return save(
        workdir,
        f"reconstruct-step{vae.step}-{split}-count{count}",
        figures.reconstructions(
            image / np.float32(255),
            reconstruction,
            label,
            f"Images of {split} and their reconstructions: {vae.title}",
        ),
        image=image,
        label=label,
        reconstruction=reconstruction,
    )


def interpolate(
    workdir: str,
    config: dict,
    checkpoint: str,
    split: str,
    count: int,
    images: list[int] | None,
    digits: list[int] | None,
) -> list[Path]:
    """Images decoded from the line between the encodings of two images; those that `choose_images` chooses."""
    vae, examples = load_with_split(workdir, config, checkpoint, split)
    if count < 2:
        raise ValueError(f"--count is {count}, but an interpolation has at least 2")
    index = choose_images(examples, split, 2, images, digits)
    mean, _ = vae.encode(examples.image[index])
    image = vae.decode(generate.interpolate(*jnp.asarray(mean), count))
    ends = examples.image[index] / np.float32(255)
    row = np.concatenate([ends[:1], image, ends[1:]])
    marks = [f"{share:.0%}" for share in np.linspace(0, 1, count)]
    return save(
        workdir,
        f"interpolate-step{vae.step}-{split}{index[0]}-{split}{index[1]}-count{count}",
        figures.image_rows(
            row[None],
            [""],
            ["input", *marks, "input"],
            f"Between two images of {split}: {vae.title}",
        ),
        image=image,
        index=index,
    )


def traverse(
    workdir: str,
    config: dict,
    checkpoint: str,
    split: str,
    count: int,
    images: list[int] | None,
    digits: list[int] | None,
) -> list[Path]:
    """An image's encoding decoded with one latent at a time moved, the latents that carry the most (KL) first."""
    vae, examples = load_with_split(workdir, config, checkpoint, split)
    index = choose_images(examples, split, 1, images, digits)
    mean, logvar = vae.encode(examples.image)
    one_by_one = (jnp.asarray(part).reshape(-1, 1) for part in (mean, logvar))
    kl = np.reshape(kl_to_standard_normal(*one_by_one), mean.shape).mean(axis=0)
    order = np.argsort(-kl)
    values = np.linspace(-LIMIT, LIMIT, count, dtype=np.float32)
    z = generate.traverse(*map(jnp.asarray, (mean[index[0]], values)))[order]
    image = vae.decode(z.reshape(-1, z.shape[-1]))
    image = image.reshape(*z.shape[:2], *image.shape[1:])
    return save(
        workdir,
        f"traverse-step{vae.step}-{split}{index[0]}-count{count}",
        figures.image_rows(
            image,
            [f"z{latent}: {kl[latent]:.2f} nats" for latent in order],
            [f"{value:.1f}" for value in values],
            f"One latent at a time, by its mean KL: {vae.title}",
        ),
        image=image,
        latent=order,
        kl=kl[order],
        value=values,
    )


def predict(workdir: str, checkpoint: str, images: str) -> list[Path]:
    """A CSV of file, label and probability for the images of an .npz or a folder."""
    classifier = load_model(workdir, checkpoint, "classifier")
    names, image = data.read_images(images)
    try:
        label, probability = classifier.predict(image)
    except ValueError as error:
        raise ValueError(f"{images} does not fit the model: {error}") from None
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["file", "label", "probability"])
    rows.writerows(zip(names, label, (f"{value:.6f}" for value in probability)))
    path = generated(workdir) / f"predict-step{classifier.step}-{Path(images).stem}.csv"
    if path.exists() and path.read_text(encoding="utf-8") != text.getvalue():
        raise FileExistsError(f"{path} holds other predictions: move it away")
    write_whole(path, text.getvalue())
    return [path]


def load_model(workdir: str, checkpoint: str, wanted: str) -> Any:
    """`load`, of a model of the name that a mode needs. Raises ValueError if it is another."""
    trained = load(workdir, checkpoint)
    name = trained.config["model"]["name"]
    if name != wanted:
        raise ValueError(f"{workdir} holds a {name}, but this mode needs a {wanted}")
    return trained


def load_with_split(
    workdir: str, config: dict, checkpoint: str, split: str
) -> tuple[TrainedVAE, Split]:
    """The VAE of a run, and a split of the data that it was trained on."""
    vae = load_model(workdir, checkpoint, "vae")
    dataset = bind("data", data.load, config["data"])()
    check_trained_on(vae.data, fingerprint(dataset))
    return vae, choose_split(dataset, split)


def check_trained_on(expected: dict, found: dict) -> None:
    """Raise ValueError if the data's fingerprint is not that of the data which a model was trained on."""
    if found != expected:
        raise ValueError(
            "the data are not those that the model was trained on: bring those back, or train again"
        )


def choose_split(dataset: Dataset, split: str) -> Split:
    """A split by its name. Raises ValueError if there is none of that name."""
    if split not in dataset.splits:
        raise ValueError(
            f"there is no split {split!r}: this run has {', '.join(dataset.splits)}"
        )
    return dataset.splits[split]


def choose_images(
    examples: Split,
    split: str,
    count: int,
    images: list[int] | None,
    digits: list[int] | None,
) -> np.ndarray:
    """`count` positions in a split: those given, or the first image of each label given; the first ones by default."""
    if images is not None and digits is not None:
        raise ValueError("--images and --digits are both given: give one of them")
    if images is None and digits is None:
        images = list(range(count))
    name, given = ("--images", images) if digits is None else ("--digits", digits)
    if len(given) != count:
        raise ValueError(
            f"{name} has {len(given)} entries, but this mode takes {count}"
        )
    if images is not None:
        for index in images:
            if not 0 <= index < len(examples.label):
                raise ValueError(
                    f"there is no image {index} in {split}: it has 0 to {len(examples.label) - 1}"
                )
        return np.array(images)
    for label in digits:
        if label < 0 or label not in examples.label:
            known = [str(known) for known in np.unique(examples.label) if known >= 0]
            has = f"it has {', '.join(known)}" if known else "it is unlabelled"
            raise ValueError(f"there is no image labelled {label} in {split}: {has}")
    return np.array([np.argmax(examples.label == label) for label in digits])


def generated(workdir: str) -> Path:
    """Where the modes write."""
    folder = local_path(workdir) / "generated"
    folder.mkdir(exist_ok=True)
    return folder


def save(workdir: str, name: str, figure: Any, **arrays) -> list[Path]:
    """generated/NAME.png and .npz; the name says all that decides the content, so that nothing else is overwritten."""
    paths = [generated(workdir) / f"{name}.{kind}" for kind in ("png", "npz")]
    save_figure(figure, paths[0])
    with whole_file(paths[1]) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)
    return paths
