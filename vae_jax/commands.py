"""What `--mode` does with a trained model: numbers and pictures. A mode asks for a capability, not for a model's name."""

import csv
import io
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax import data, figures, generate, weights
from vae_jax.batch import Dataset, Split
from vae_jax.evaluation.verdict import verdict
from vae_jax.export import export as export_model
from vae_jax.full_evaluation import evaluate_fully
from vae_jax.full_evaluation.prior import fit_prior
from vae_jax.loading import load_variables
from vae_jax.pretrained import Pretrained, load, of_seed
from vae_jax.run.config import bind
from vae_jax.run.evaluate import as_seen
from vae_jax.run.files import atomic_file, local_path, save_figure, write_atomically
from vae_jax.run.session import build, fingerprint

LIMIT = 3.0  # standard deviations of the prior that a traversal covers on either side


def evaluate(
    workdir: str,
    config: dict,
    checkpoint: str,
    split: str,
    full: bool = False,
    samples: int = 5000,
    count: int | None = None,
    prior: str = "model",
) -> dict[str, Any]:
    """The metrics of a checkpoint on a split, as training logged them, and the baselines of the training images.

    With `full` also the numbers of `full_evaluation` and a verdict in words; for the prior "gmm" those of the model with a mixture
    in place of its prior.
    """
    metadata, variables = load_variables(workdir, checkpoint)
    job = build(config)
    check_trained_on(metadata["data"], job.metadata["data"])
    choose_split(job.dataset, split)
    if full:
        vae = check_able(of_seed(workdir, metadata, variables), workdir, "encode", "encoder")
    numbers, _ = job.evaluate_on(split)(variables, job.root())
    named = {f"{split}/{name}": value for name, value in numbers.items()}
    found = {"step": metadata["step"]} | named
    if full:
        if prior == "gmm":
            vae = vae.with_prior(fit_prior(vae, job.dataset)[0])
        found |= evaluate_fully(vae, job.dataset, split, samples, count, generated(workdir), prior)
        found |= verdict(found, split, job.baselines())
    return found | job.ledger(named, split) | job.baselines()


def sample(
    workdir: str,
    config: dict,
    checkpoint: str,
    count: int,
    seed: int,
    prior: str = "model",
    labels: list[int] | None = None,
) -> list[Any]:
    """Images decoded from the prior, as a grid and as .npz; for the prior "gmm" also the test bound under both priors.

    A model that is conditioned on labels takes the given ones in turn.
    """
    if prior == "model":
        vae = load_able(workdir, checkpoint, "decode_raw", "decoder")
        given = {} if labels is None else {"label": np.resize(np.array(labels), count)}
        image, lines, of = vae.sample(count, seed, **given), [], "the prior"
    else:
        vae, dataset = load_with_data(workdir, config, checkpoint)
        gmm, lines = fit_prior(vae, dataset)
        z = gmm.sample(vae.variables, jax.random.key(seed), count)
        image, of = vae.decode(z), "a mixture fitted to the posteriors"
    title = f"{count} images decoded from {of}: {vae.title}"
    name = f"sample-step{vae.step}-count{count}-seed{seed}" + ("" if prior == "model" else f"-{prior}")
    name += "" if labels is None else f"-labels{'-'.join(map(str, labels))}"
    return save(workdir, name, figures.image_grid(image, title), image=image) + lines


def reconstruct(workdir: str, config: dict, checkpoint: str, split: str, count: int) -> list[Path]:
    """The first `count` images of a split beside their reconstructions."""
    vae, examples = load_with_split(workdir, config, checkpoint, split)
    if count > len(examples.label):
        raise ValueError(f"--count is {count}, but {split} has {len(examples.label)} images")
    image, label = examples.image[:count], examples.label[:count]
    reconstruction = vae.reconstruct(image, **vae.own_label(label))
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
    labels: list[int] | None,
) -> list[Path]:
    """Images decoded from the line between the encodings of the two images that `choose_images` chooses."""
    vae, examples = load_with_split(workdir, config, checkpoint, split)
    if count < 2:
        raise ValueError(f"--count is {count}, but an interpolation has at least 2")
    index = choose_images(examples, split, 2, images, labels)
    image, label = examples.image[index], examples.label[index]
    mean, _ = vae.encode(image, **vae.own_label(label))
    image = vae.decode(generate.interpolate(*jnp.asarray(mean), count), **vae.condition_of(image[:1], label[0]))
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
    labels: list[int] | None,
) -> list[Path]:
    """An image's encoding decoded with one latent at a time moved, sorted by how much each latent is used over the split.

    The measure is the mean KL, or the variance of the posterior mean if the prior has no KL in closed form.
    """
    vae, examples = load_with_split(workdir, config, checkpoint, split)
    index = choose_images(examples, split, 1, images, labels)
    mean, logvar = map(jnp.asarray, vae.encode(examples.image, **vae.own_label(examples.label)))
    if vae.model.prior.kl is None or vae.model.condition_on:
        use, unit = np.var(mean, axis=0), "variance"
    else:
        use, unit = np.mean(vae.model.prior.kl(vae.variables, mean, logvar), axis=0), "nats"
    order = np.argsort(-use)
    values = np.linspace(-LIMIT, LIMIT, count, dtype=np.float32)
    z = generate.traverse(mean[index[0]], jnp.asarray(values))[order]
    conditions = vae.condition_of(examples.image[index], examples.label[index[0]])
    image = vae.decode(z.reshape(-1, z.shape[-1]), **conditions)
    image = image.reshape(*z.shape[:2], *image.shape[1:])
    return save(
        workdir,
        f"traverse-step{vae.step}-{split}{index[0]}-count{count}",
        figures.image_rows(
            image,
            [f"z{latent}: {use[latent]:.2f} {unit}" for latent in order],
            [f"{value:.1f}" for value in values],
            f"One latent at a time, by its {'mean KL' if unit == 'nats' else 'posterior mean'}: {vae.title}",
        ),
        image=image,
        latent=order,
        **{"kl" if unit == "nats" else "variance": use[order]},
        value=values,
    )


def predict(workdir: str, checkpoint: str, images: str) -> list[Path]:
    """A CSV of file, label and probability for the images of an .npz or a folder."""
    classifier = load_able(workdir, checkpoint, "probabilities", "classes")
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
    write_atomically(path, text.getvalue())
    return [path]


def export(workdir: str, checkpoint: str, output: str | None, formats: list[str] | None) -> list[Path]:
    """The model as a folder for a model hub, by default in generated/; nothing is uploaded."""
    folder = output or str(generated(workdir) / f"export-step{load_variables(workdir, checkpoint)[0]['step']}")
    return export_model(workdir, folder, checkpoint, formats=formats or ())


def load_able(workdir: str, checkpoint: str, function: str, what: str) -> Pretrained:
    """`load` and `check_able`."""
    return check_able(load(workdir, checkpoint), workdir, function, what)


def check_able(pretrained: Pretrained, workdir: str, function: str, what: str) -> Pretrained:
    """The given model. Raises ValueError if it has not the function that a mode needs."""
    try:
        pretrained.check_has(function, what)
    except ValueError as error:
        raise ValueError(f"this mode does not fit the run in {workdir}: {error}") from None
    return pretrained


def load_with_split(workdir: str, config: dict, checkpoint: str, split: str) -> tuple[Pretrained, Split]:
    """The model of a run, with encoder and decoder, and a split of the data that it was trained on, as it sees them."""
    vae, dataset = load_with_data(workdir, config, checkpoint)
    return vae, as_seen(choose_split(dataset, split), dataset.binarize, config["seed"])


def load_with_data(workdir: str, config: dict, checkpoint: str) -> tuple[Pretrained, Dataset]:
    """The model of a run, with encoder and decoder, and the data that it was trained on."""
    vae = load_able(workdir, checkpoint, "encode", "encoder")
    vae.check_has("decode_raw", "decoder")
    dataset = bind("data", data.load, config["data"])()
    check_trained_on(vae.data, fingerprint(dataset))
    return vae, dataset


def check_trained_on(expected: dict, found: dict) -> None:
    """Raise ValueError unless the data's fingerprint is that of the data a model was trained on."""
    if found != expected:
        raise ValueError("the data are not those that the model was trained on: bring those back, or train again")


def choose_split(dataset: Dataset, split: str) -> Split:
    """A split by its name. Raises ValueError for an unknown name."""
    if split not in dataset.splits:
        raise ValueError(f"there is no split {split!r}: this run has {', '.join(dataset.splits)}")
    return dataset.splits[split]


def choose_images(
    examples: Split,
    split: str,
    count: int,
    images: list[int] | None,
    labels: list[int] | None,
) -> np.ndarray:
    """`count` positions in a split: the given ones, or the first image of each given label; by default the first ones."""
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


def generated(workdir: str) -> Path:
    """The folder that the modes write to: in the run directory, or of a model in the box generated/NAME here."""
    path = local_path(workdir)
    folder = Path("generated") / path.name if weights.in_box(path) else path / "generated"
    folder.mkdir(parents=weights.in_box(path), exist_ok=True)
    return folder


def save(workdir: str, name: str, figure: Any, **arrays) -> list[Path]:
    """Write generated/NAME.png and .npz; the name holds all that decides the content, so nothing else is overwritten."""
    paths = [generated(workdir) / f"{name}.{kind}" for kind in ("png", "npz")]
    save_figure(figure, paths[0])
    with atomic_file(paths[1]) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)
    return paths
