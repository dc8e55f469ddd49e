"""Where the modes write what they make: generated/ in the run directory."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vae_jax import figures, weights
from vae_jax.run.files import atomic_file, explained, local_path, save_figure, save_film, save_image


def generated(workdir: str) -> Path:
    """Create the folder that modes write to: generated/ in the run directory; generated/NAME for a bundled model."""
    path = local_path(workdir)
    folder = Path("generated") / path.name if weights.in_box(path) else path / "generated"
    with explained(f"cannot write to {folder}", "copy the run to a folder that you may write to"):
        folder.mkdir(parents=weights.in_box(path), exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def save(workdir: str, name: str, figure: Any, frames: Sequence[np.ndarray] = (), **arrays) -> list[Path]:
    """Write generated/NAME.png, .npz and, from `frames`, .webp. NAME contains all that determines the content."""
    paths = [generated(workdir) / f"{name}.{kind}" for kind in ("png", "npz", "webp")]
    save_figure(figure, paths[0])
    save_arrays(paths[1], **arrays)
    if frames:
        save_film(frames, paths[2])
    return paths if frames else paths[:2]


def save_arrays(path: Path, **arrays) -> None:
    """Write an .npz."""
    with atomic_file(path) as part, open(part, "wb") as file:
        np.savez_compressed(file, **arrays)


def save_each(workdir: str, name: str, image: np.ndarray) -> list[Any]:
    """Write images in [0, 1] to generated/NAME/00000.png and so on."""
    folder = generated(workdir) / name
    folder.mkdir(exist_ok=True)
    for i, pixels in enumerate(figures.as_bytes(image)):
        save_image(pixels, folder / f"{i:05}.png")
    return [folder, f"{len(image)} files"]
