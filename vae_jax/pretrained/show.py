"""How a trained model is shown in a shell and in a notebook."""

import base64
import html
import io
from typing import Any

import numpy as np

from vae_jax.figures import as_bytes, mosaic
from vae_jax.run.files import as_pillow

COLUMNS, ROWS, GAP = 8, 2, 2


def describe(pretrained: Any) -> str:
    """Describe family, data, training, sizes and the model's fields that differ from the defaults, in a few lines."""
    from vae_jax.run.config import differing

    height, width, channels = pretrained.image_shape
    latents = f", {pretrained.model.latent_dim} latents" if pretrained.model.latent_dim else ""
    changed = differing(pretrained.config)
    model = [f"{name.removeprefix('model.')} {value}" for name, value in changed.items() if name.startswith("model.")]
    losses = [
        f"{name} {value:.4g}" for name, value in pretrained.metadata.get("metrics", {}).items() if name == "test/loss"
    ]
    return "\n  ".join(
        [
            f"<{pretrained.title}: step {pretrained.step}, {pretrained.parameters:,} parameters",
            ", ".join([f"images of {height}x{width}x{channels}{latents}", *model, *losses]) + ">",
        ]
    )


def describe_in_html(pretrained: Any) -> str:
    """The same as HTML, with 16 generated images if the model can generate without being given an image."""
    text = f"<pre>{html.escape(describe(pretrained))}</pre>"
    model = pretrained.model
    if model.decode_raw is None or model.condition_on == "image":
        return f"<div>{text}</div>"
    count = COLUMNS * ROWS
    images = pretrained.sample(count, **pretrained.own_label(np.arange(count) % (model.num_classes or 1)))
    shown = max(2 * COLUMNS * (pretrained.image_shape[1] + GAP), 256)
    picture = (
        f'<img alt="{count} generated images" width="{shown}" style="image-rendering: pixelated" src="{png(images)}">'
    )
    return f"<div>{text}{picture}</div>"


def png(images: np.ndarray) -> str:
    """Tile images in [0, 1], [n, height, width, channel], on white; returns the picture as a data URI."""
    framed = np.pad(images, ((0, 0), (GAP, 0), (GAP, 0), (0, 0)), constant_values=1.0)
    pixels = as_bytes(mosaic(framed, COLUMNS))
    file = io.BytesIO()
    as_pillow(pixels).save(file, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
