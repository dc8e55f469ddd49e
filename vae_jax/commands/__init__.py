"""What `--mode` does with a trained model: numbers and pictures. A mode asks for a capability, not for a model's name."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vae_jax import figures, generate
from vae_jax.batch import Split
from vae_jax.commands.examples import (
    check_able,
    check_has_latents,
    check_trained_on,
    choose_images,
    choose_split,
    load_able,
    load_examples,
    load_with_data,
    read_own,
    read_unlabelled,
    shortened,
)
from vae_jax.commands.results import generated, save, save_arrays, save_each
from vae_jax.evaluation.latents import tsne_plane
from vae_jax.evaluation.verdict import verdict
from vae_jax.export import export as export_model
from vae_jax.full_evaluation import check_full, evaluate_fully
from vae_jax.full_evaluation.prior import compare_bounds, fit_prior
from vae_jax.pretrained import of_seed
from vae_jax.pretrained.loading import load_variables
from vae_jax.run.files import as_csv, save_figure, write_atomically
from vae_jax.run.seeds import first_seed
from vae_jax.run.session import build

LIMIT = 3.0  # standard deviations of the prior that a traversal covers on either side
USED = {"nats": 0.05, "variance": 0.01}  # least use for a traversal to show a latent; variance: Burda et al. 2016


def evaluate(
    workdir: str,
    config: dict,
    checkpoint: str,
    split: str,
    full: bool = False,
    samples: int = 5000,
    count: int | None = None,
    prior: str = "model",
    own: str | None = None,
) -> dict[str, Any]:
    """The metrics of a checkpoint on a split, as training logs them, and the baselines of the training images.

    The images at the path `own`, if given, form another split, named after the path and their hash.
    `full` adds the numbers of `full_evaluation` and a verdict in words. With the prior "gmm", a mixture replaces the
    model's prior in these numbers; those under the model's own prior say so in their names.
    """
    metadata, variables = load_variables(workdir, checkpoint)
    job = build(config)
    check_trained_on(metadata["data"], job.metadata["data"])
    if full or own is not None:
        vae = check_able(of_seed(workdir, metadata, variables), workdir, encode="encoder")
    if full:  # of the first seed, as all the other numbers
        job, variables = job._replace(seeds=job.seeds[:1]), first_seed(variables, job.seeds)
    if own is not None:
        examples = read_unlabelled(vae, own)
        split = examples.file
        job.dataset.splits[split] = Split(examples.image, examples.label)
    choose_split(job.dataset, split)
    if full:
        check_full(vae, job.dataset, split, samples, count)  # before the work
    numbers, _ = job.evaluate_on(split)(variables, job.root())
    named = {f"{split}/{name}": value for name, value in numbers.items()}
    found, judged = {"step": metadata["step"]} | named, {}
    if full:
        if prior == "gmm":
            vae = vae.with_prior(fit_prior(vae, job.dataset))
        found |= evaluate_fully(vae, job.dataset, split, samples, count, generated(workdir), prior)
    ledger = job.ledger(found, split)
    if full and own is None:  # the baselines are those of the training images
        judged = verdict(found | ledger, split, job.baselines())
    notes = {"what was done to the images": "; ".join(examples.notes)} if own is not None and examples.notes else {}
    result = found | ledger | job.baselines() | notes | judged
    if not full or prior == "model":
        return result
    own_prior = tuple(f"{split}/{name}" for name in ("loss", "bound", "kl"))  # the objective's, as in training
    return {f"{name}, p(z) of the model" if name.startswith(own_prior) else name: result[name] for name in result}


def sample(
    workdir: str,
    config: dict,
    checkpoint: str,
    count: int,
    seed: int,
    prior: str = "model",
    labels: list[int] | None = None,
    files: bool = False,
    own: str | None = None,
) -> list[Any]:
    """Write images decoded from the prior as a grid and as .npz; "gmm" also gives the test bound under both priors.

    `files` writes one PNG per image instead. A conditional model takes the given labels, or the images to complete at
    the path `own`, in turn.
    """
    if prior == "model":
        vae, of = load_able(workdir, checkpoint, decode_raw="decoder"), "the prior"
        given, lines, named = {}, [], ""
        if labels is not None:
            if not labels:
                raise ValueError("--labels is empty: give one label, or several")
            if len(labels) > count:
                raise ValueError(f"--labels has {len(labels)} labels, but --count is {count}: raise it")
            given["label"] = np.resize(np.array(labels), count)
            named += f"-labels{shortened('-'.join(map(str, labels)))}"
        if own is not None:
            examples = read_own(vae, own)
            given["image"] = np.resize(examples.image, (count, *vae.image_shape))
            named += f"-{examples.file}"
            lines += examples.notes
            if len(examples.image) > count:
                lines.append(f"the first {count} of {len(examples.image)} images: --count chooses how many")
        image = vae.sample(count, seed, **given)
    else:
        if labels is not None or own is not None:
            raise ValueError("--labels and --input do not go with --prior=gmm: a mixture takes no condition")
        vae, dataset = load_with_data(workdir, config, checkpoint)
        gmm = fit_prior(vae, dataset)
        lines = compare_bounds(vae, gmm, dataset)
        z = gmm.sample(vae.variables, jax.random.key(seed), count)
        image, of, named = vae.decode(z), "a mixture fitted to the posteriors", f"-{prior}"
    title = f"{count} images decoded from {of}: {vae.title}"
    name = f"sample-step{vae.step}-count{count}-seed{seed}{named}"
    if files:
        return [*save_each(workdir, name, image), *lines]
    return save(workdir, name, figures.image_grid(image, title), image=image) + lines


def reconstruct(
    workdir: str, config: dict, checkpoint: str, split: str, count: int, own: str | None = None
) -> list[Any]:
    """Draw the first `count` images of a split, or up to `count` of the user's own, next to their reconstructions."""
    vae, examples = load_examples(workdir, config, checkpoint, split, own)
    if count > len(examples.label) and own is None:
        raise ValueError(f"--count is {count}, but {split} has {len(examples.label)} images")
    image, label = examples.image[:count], examples.label[:count]
    left = len(examples.label) - len(image)
    more = [f"the first {count} of {len(examples.label)} images: --count chooses how many"] if own and left else []
    reconstruction = vae.reconstruct(image, **vae.own_label(label))
    return save(
        workdir,
        f"reconstruct-step{vae.step}-{examples.file}-count{len(image)}",
        figures.reconstructions(
            image / np.float32(255),
            reconstruction,
            label,
            f"Images of {examples.title} and their reconstructions: {vae.title}",
        ),
        image=image,
        label=label,
        reconstruction=reconstruction,
    ) + [*examples.notes, *more]


def interpolate(
    workdir: str,
    config: dict,
    checkpoint: str,
    split: str,
    count: int,
    images: list[int] | None,
    labels: list[int] | None,
    own: str | None = None,
) -> list[Any]:
    """Decode points on the line between the encodings of two images, which `choose_images` chooses."""
    vae, examples = load_examples(workdir, config, checkpoint, split, own)
    check_has_latents(vae)
    if count < 2:
        raise ValueError(f"--count is {count}, but an interpolation needs at least 2")
    index = choose_images(examples, examples.title, 2, images, labels)
    image, label = examples.image[index], examples.label[index]
    mean, _ = vae.encode(image, **vae.seen_label(label))
    image = vae.decode(generate.interpolate(*jnp.asarray(mean), count), **vae.condition_of(image[:1], label[0]))
    ends = examples.image[index] / np.float32(255)
    row = np.concatenate([ends[:1], image, ends[1:]])
    marks = [f"{share:.0%}" for share in np.linspace(0, 1, count)]
    return save(
        workdir,
        f"interpolate-step{vae.step}-{examples.at(index[0])}-{examples.at(index[1])}-count{count}",
        figures.image_rows(
            row[None],
            [""],
            ["input", *marks, "input"],
            f"Between two images of {examples.title}: {vae.title}",
        ),
        image=image,
        index=index,
    ) + [*examples.notes]


def traverse(
    workdir: str,
    config: dict,
    checkpoint: str,
    split: str,
    count: int,
    images: list[int] | None,
    labels: list[int] | None,
    own: str | None = None,
    all_latents: bool = False,
) -> list[Any]:
    """Decode an image's encoding with one latent moved at a time; latents are sorted by their use over the split.

    Use is the mean KL, or the variance of the posterior mean if the prior has no closed-form KL or the model is
    conditional. Latents below USED are left out unless `all_latents` is set or all are below it. Triangles mark the
    image's own values.
    """
    vae, examples = load_examples(workdir, config, checkpoint, split, own)
    check_has_latents(vae)
    index = choose_images(examples, examples.title, 1, images, labels)
    mean, logvar = map(jnp.asarray, vae.encode(examples.image, **vae.seen_label(examples.label)))
    if vae.model.prior.kl is None or vae.model.condition_on:
        use, unit = np.var(mean, axis=0), "variance"
    else:
        use, unit = np.mean(vae.model.prior.kl(vae.variables, mean, logvar), axis=0), "nats"
    order, notes = np.argsort(-use), []
    used = int(np.sum(use >= USED[unit]))
    if not all_latents and 0 < used < len(use):
        order = order[:used]
        notes = [f"left out: {len(use) - used} of {len(use)} latents, below {USED[unit]} {unit}; --all shows them"]
    values = np.linspace(-LIMIT, LIMIT, count, dtype=np.float32)
    marks = np.interp(mean[index[0]][order], values, np.arange(count), left=np.nan, right=np.nan)
    z = generate.traverse(mean[index[0]], jnp.asarray(values))[order]
    conditions = vae.condition_of(examples.image[index], examples.label[index[0]])
    image = vae.decode(z.reshape(-1, z.shape[-1]), **conditions)
    image = image.reshape(*z.shape[:2], *image.shape[1:])
    return save(
        workdir,
        f"traverse-step{vae.step}-{examples.at(index[0])}-count{count}" + ("-all" if all_latents else ""),
        figures.image_rows(
            image,
            [f"z{latent}: {use[latent]:.2f} {unit}" for latent in order],
            [f"{value:.1f}" for value in values],
            f"One latent at a time, by its {'mean KL' if unit == 'nats' else 'posterior mean'}, "
            f"triangles at the image's own values: {vae.title}",
            marks,
        ),
        figures.film(image),
        image=image,
        latent=order,
        **{"kl" if unit == "nats" else "variance": use[order]},
        value=values,
    ) + [*examples.notes, *notes]


def encode(
    workdir: str, config: dict, checkpoint: str, split: str, own: str | None = None, tsne: bool = False
) -> list[Any]:
    """Write mean and log-variance of q(z | x) of every image as .npz and .csv; `tsne` adds a map of the means."""
    vae, examples = load_examples(workdir, config, checkpoint, split, own, decodes=False)
    if tsne:
        check_has_latents(vae)
    mean, logvar = vae.encode(examples.image, **vae.seen_label(examples.label))
    path = generated(workdir) / f"encode-step{vae.step}-{examples.file}.npz"
    save_arrays(path, name=np.array(examples.names), label=examples.label, mean=mean, logvar=logvar)
    columns = [f"{what}{latent}" for what in ("mean", "logvar") for latent in range(mean.shape[1])]
    rows = ([name, *map("{:.8g}".format, row)] for name, row in zip(examples.names, np.hstack([mean, logvar])))
    write_atomically(path.with_suffix(".csv"), as_csv(["file", *columns], rows))
    paths = [path, path.with_suffix(".csv")]
    if tsne:
        paths.append(path.with_name(f"{path.stem}-tsne.png"))
        title = f"Codes of {examples.title} by t-SNE, which keeps neighbours, not distances: {vae.title}"
        save_figure(figures.codes(tsne_plane(mean), examples.label, ("", ""), title), paths[-1])
    return [*paths, *examples.notes]


def predict(workdir: str, checkpoint: str, own: str) -> list[Any]:
    """Write a CSV of file, label and probability for the user's own images."""
    classifier = load_able(workdir, checkpoint, probabilities="classes")
    examples = read_own(classifier, own)
    label, probability = classifier.predict(examples.image)
    rows = zip(examples.names, label, (f"{value:.6f}" for value in probability))
    path = generated(workdir) / f"predict-step{classifier.step}-{examples.file}.csv"
    write_atomically(path, as_csv(["file", "label", "probability"], rows))
    return [path, *examples.notes]


def export(workdir: str, checkpoint: str, output: str | None, formats: list[str] | None) -> list[Path]:
    """Export the model as a folder for a model hub, by default in generated/; nothing is uploaded."""
    folder = output or str(generated(workdir) / f"export-step{load_variables(workdir, checkpoint)[0]['step']}")
    return export_model(workdir, folder, checkpoint, formats=formats or ())
