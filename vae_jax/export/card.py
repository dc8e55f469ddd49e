"""The model card of an exported model: README.md with the metadata that model hubs read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vae_jax.data import is_own
from vae_jax.families import FAMILIES
from vae_jax.pretrained import Pretrained

HOLDS = {
    ".safetensors": "the weights, named by their paths",
    ".json": "everything else: the training's config, the shape of an image, test numbers, versions",
    ".jaxexport": "a program for `jax.export.deserialize`, on CPU, CUDA and TPU, weights included",
    ".onnx": "the same for ONNX runtimes",
}
USES = {
    "decode_raw": "images = model.sample(16{})  # [16, {}], in [0, 1]",
    "probabilities": "label, probability = model.predict(images)  # uint8, or floats in [0, 1], [n, {}]",
}


def model_card(pretrained: Pretrained, metadata: Mapping[str, Any], files: Sequence[str]) -> str:
    """The card in Markdown, after YAML front matter in JSON notation."""
    config, model = metadata["config"], pretrained.model
    generates = model.decode_raw is not None
    facts = {
        "library_name": "vae_jax",
        "pipeline_tag": "unconditional-image-generation" if generates else "image-classification",
        "datasets": [name for name in [config["data"]["name"]] if not is_own(name)],
        "tags": ["jax", "flax", *(["variational-autoencoder"] if generates else []), config["model"]["name"]],
    }
    if model.condition_on:  # model hubs have no tag for conditional generation
        del facts["pipeline_tag"]
    shape = ", ".join(map(str, pretrained.image_shape))
    data = metadata["data"]
    settings = ", ".join(f"{name} {config[name]}" for name in ("epochs", "batch_size", "seed"))
    trained = f"trained by vae_jax on {data.get('train', 0):,} images: {settings}, step {metadata['step']}"
    lines = [
        "---",
        *(f"{name}: {json.dumps(value)}" for name, value in facts.items()),
        "---",
        f"# {pretrained.title}",
        "",
        f"{pretrained.parameters:,} parameters, for images of [{shape}], {trained}.",
        "",
        "```python",
        "import vae_jax",
        "",
        'model = vae_jax.load("PATH OF THIS FOLDER")',
        *usage(pretrained, shape),
        "```",
        "",
    ]
    if rows := numbers(metadata):
        lines += [f"On {data.get('test', 0):,} test images:", "", "| number | value |", "|---|---|", *rows, ""]
    lines += [
        "| file | what it holds |",
        "|---|---|",
        *(f"| `{name}` | {HOLDS[Path(name).suffix]} |" for name in files),
        "",
    ]
    lines.append(f"Versions in training: {', '.join(map(' '.join, metadata['versions'].items()))}.")
    return "\n".join(lines) + "\n"


def usage(pretrained: Pretrained, shape: str) -> list[str]:
    """Lines of Python that use the model."""
    condition = {"label": ", label=3", "image": ", image=image"}.get(pretrained.model.condition_on, "")
    uses = [USES["decode_raw"].format(condition, shape)] if pretrained.model.decode_raw is not None else []
    return uses + ([USES["probabilities"].format(shape)] if pretrained.model.probabilities is not None else [])


def numbers(metadata: Mapping[str, Any]) -> list[str]:
    """Table rows of the scalar test metrics, with their meaning."""
    known = FAMILIES[metadata["config"]["model"]["name"]].METRICS
    rows = []
    for name, value in metadata["metrics"].items():
        metric = known.get(name.removeprefix("test/"))
        if metric is not None and isinstance(value, int | float):
            meaning = metric.meaning.replace("|", r"\|")
            rows.append(f"| {name}: {meaning}, {metric.unit} | {value:.4g} |")
    return rows
