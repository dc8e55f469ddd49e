"""`--mode=evaluate --full`: every measurement of a trained VAE, with reference values or standard errors.

Measurements that do not apply are replaced by the reason. The numbers go to generated/evaluation-*.json, and the
figures to the same folder. Until then finished parts of the likelihood lie there as JSON lines.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vae_jax import figures
from vae_jax.batch import Dataset
from vae_jax.evaluation.latents import decompose_kl, principal_axes, probe_labels
from vae_jax.full_evaluation.likelihood import likelihood_numbers
from vae_jax.full_evaluation.picture import draw_evaluation
from vae_jax.full_evaluation.samples import generated_numbers
from vae_jax.full_evaluation.subject import Subject, as_floats
from vae_jax.pretrained import MOST_SAMPLES, Pretrained
from vae_jax.pretrained.arguments import check_all_labelled
from vae_jax.run.files import save_figure, write_atomically


def evaluate_fully(
    vae: Pretrained, dataset: Dataset, split: str, samples: int, count: int | None, folder: Path, prior: str = "model"
) -> dict[str, Any]:
    """{name: number} for a VAE on a split, or {name: reason} for a number that does not apply.

    Args:
        samples: draws of z per image for the likelihood.
        count: number of images for the likelihood; by default 1,000, or all if there are fewer.
        prior: name of the prior, for the file names.
        folder: destination of finished parts, figures and numbers; the same call continues an interrupted one.

    Raises ValueError as `check_full` does.
    """
    count = check_full(vae, dataset, split, samples, count)
    subject = Subject(vae, dataset, split)
    name = f"evaluation-step{vae.step}-{split}-samples{samples}-count{count}" + (
        "" if prior == "model" else f"-{prior}"
    )
    codes, parts = subject.encode(), folder / f"{name}.jsonl"
    numbers = likelihood_numbers(subject, samples, count, parts)
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
    parts.unlink(missing_ok=True)
    return found


def check_full(vae: Pretrained, dataset: Dataset, split: str, samples: int, count: int | None) -> int:
    """The number of images for the likelihood.

    Raises ValueError for samples below 1, if the split has fewer images than `count`, if p(z) has no closed form, and
    for unlabelled images if the model is conditioned on the label.
    """
    vae.check_has_density()
    label = dataset.splits[split].label
    count = min(1000, len(label)) if count is None else count
    if not 1 <= samples <= MOST_SAMPLES:
        raise ValueError(f"--samples is {samples}, but must be from 1 to {MOST_SAMPLES}")
    if not 1 <= count <= len(label):
        raise ValueError(f"--count is {count}, but {split} has {len(label)} images: give 1 to {len(label)}")
    if vae.model.condition_on == "label":
        check_all_labelled(split, label)
    return count


def latent_numbers(subject: Subject, codes: dict[str, np.ndarray]) -> dict[str, Any]:
    """The decomposition of the KL, and how well the codes predict the labels."""
    model = subject.vae.model
    if not model.latent_dim:
        return {"mutual_information": "left out: a regression has no latents"}
    of_prior = (codes["kl"], codes.get("kl_by_latent")) if model.prior.shared else (None, None)
    numbers = decompose_kl(codes["z"], codes["mean"], codes["logvar"], *of_prior)
    if not model.prior.shared:
        numbers["aggregate_kl"] = "left out: each condition has its own prior"
    if model.encoder_takes_label:
        return numbers | {"linear_probe_accuracy": "left out: the encoder is given the label"}
    label, training = subject.stored.label, subject.dataset.splits["train"]
    if subject.name == "train":
        return numbers | {"linear_probe_accuracy": "left out: a probe is fitted to the training images"}
    if (label < 0).any() or (training.label < 0).any() or len(np.unique(training.label)) < 2:
        return numbers | {"linear_probe_accuracy": "left out: a probe needs labels of at least two classes"}
    trained = Subject(subject.vae, subject.dataset, "train").encode()["mean"]
    return numbers | probe_labels((trained, training.label), (codes["mean"], label))


def draw(subject: Subject, codes: dict[str, np.ndarray], numbers: dict[str, Any], title: str, path: Path) -> None:
    """Save one figure of the likelihood curve, the latents and the reconstruction errors."""
    image = as_floats(subject.seen.image)
    conditions = subject.vae.condition_of(image, subject.seen.label)
    square = (image - subject.vae.decode(codes["mean"], **conditions)) ** 2
    error = np.mean(square, axis=(1, 2, 3)) / subject.vae.model.likelihood.covered
    curve = {int(name.split("_")[1]): value for name, value in numbers.items() if name.startswith("nll/with_")} | (
        {numbers["nll/samples"]: numbers["nll"]} if "nll/samples" in numbers else {}
    )
    variance = codes["mean"].var(axis=0, dtype=np.float64)
    planes = {}
    for what, part in (("means", "mean"), ("log-variances", "logvar")):
        if codes[part].shape[1] > 1:
            axes = principal_axes(codes[part])
            planes[f"PCA of the {what}"] = axes.project(codes[part]), axes.share
    save_figure(draw_evaluation(curve, variance, error, planes, subject.stored.label, title), path)
