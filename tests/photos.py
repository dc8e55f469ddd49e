"""Photos as a phone and the web leave them: pieces of scikit-learn's two sample images, of mixed sizes, formats and
marks.
"""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_images

FORMATS = ("jpg", "png", "webp", "bmp", "gif", "JPEG")
ORIENTATION = 0x0112


def pieces(count, seed=0):
    """Upright Pillow images of 60 to 280 pixels a side: cut from the samples, rotated by up to 15 degrees, scaled."""
    rng = np.random.default_rng(seed)
    samples = [Image.fromarray(array) for array in load_sample_images().images]
    for i in range(count):
        sample = samples[i % len(samples)]
        width, height = map(int, rng.integers(220, 400, 2))
        left, top = int(rng.integers(0, sample.width - width)), int(rng.integers(0, sample.height - height))
        cut = sample.crop((left, top, left + width, top + height)).rotate(
            float(rng.uniform(-15, 15)), Image.Resampling.BILINEAR
        )
        inner = width * 3 // 20, height * 3 // 20, width * 17 // 20, height * 17 // 20  # without black corners
        scale = rng.uniform(0.4, 1.0)
        yield cut.crop(inner).resize((int(0.7 * width * scale), int(0.7 * height * scale)))


def write(folder: Path, count: int = 30, seed: int = 0) -> list[Path]:
    """Write photos into a folder: every fifth is turned and says so in its EXIF, every seventh is grey."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for i, image in enumerate(pieces(count, seed)):
        kind, exif = FORMATS[i % len(FORMATS)], Image.Exif()
        if i % 5 == 0 and kind.lower() in ("jpg", "jpeg", "webp", "png"):
            exif[ORIENTATION] = 6  # 6: turn it by 90 degrees clockwise to see it upright
            image = image.transpose(Image.Transpose.ROTATE_90)
        if i % 7 == 3:
            image = image.convert("L")
        files.append(folder / f"photo{i:03}.{kind}")
        image.save(files[-1], **({"exif": exif} if len(exif) else {}))
    return files


def array(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Square pieces as uint8, [count, size, size, 3]."""
    return np.stack([np.asarray(image.resize((size, size))) for image in pieces(count, seed)])
