"""Convert images of any size, colour and format to uint8 pixels of one size and colour, with notes on what was done."""

import io
import math
import tempfile
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from vae_jax.data.cache import store
from vae_jax.run.files import as_pillow
from vae_jax.run.memory import check_memory

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")  # pure decoders; for some other formats Pillow starts external programs
NEVER_GREY = ("WEBP", "GIF")  # they store a grey image with three channels, as a palette does
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
UNREADABLE = (".heic", ".heif", ".avif", ".tif", ".tiff", ".dng", ".jp2", ".jxl", ".psd", ".svg")  # images, not decoded
COLOURS = ("auto", "grey", "colour")
SMALLEST = 8  # smallest data.size, in pixels
DRAFT = 4  # a JPEG is decoded at no less than this many times the wanted size: 12 megapixels take a fifth of the time
ORIENTATION = 0x0112  # the EXIF tag that records how the camera was held
TURNED = "turned upright as the camera says"
NAMED = 5  # most files that a message names


class Preparation(NamedTuple):
    """How every image of a data set is prepared (`data.size`, `data.colour`), and where the images are kept."""

    size: int = 0
    colour: str = "auto"
    scratch: Path | None = None  # folder for files used in place of memory


def check_size(what: str, nbytes: int, scratch: Path | None = None) -> None:
    """Raise TooLarge if memory cannot hold three copies: as read, as split, and on the device.

    With a folder `scratch`, files take the place of memory and nothing is checked.
    """
    if scratch is None:
        check_memory(f"three copies of {what}", 3 * nbytes, "take fewer or smaller images")


def fit(image: Any, wanted: Preparation, done: Counter) -> UInt8[np.ndarray, "height width channel"]:
    """Scale and centre-crop a Pillow image of mode L or RGB to a square of the wanted size, in the wanted colour."""
    from PIL import ImageOps

    square = (wanted.size, wanted.size)
    if wanted.size and image.size != square:
        done[f"scaled and cropped to {wanted.size}x{wanted.size}"] += 1
        image = ImageOps.fit(image, square)
    mode = {"grey": "L", "colour": "RGB"}.get(wanted.colour, image.mode)
    if mode != image.mode:
        done[f"made {wanted.colour}"] += 1
        image = image.convert(mode)
    pixels = np.asarray(image)
    return pixels.reshape(*pixels.shape[:2], -1)


def fit_array(
    image: UInt8[np.ndarray, "n height width channel"], wanted: Preparation, done: Counter
) -> UInt8[np.ndarray, "n h w c"]:
    """Prepare images that are given as an array in the same way as files."""
    n, height, width, channels = image.shape
    colour = wanted.colour if wanted.colour != "auto" else ("grey" if channels == 1 else "colour")
    result = wanted.size or height, wanted.size or width, 1 if colour == "grey" else 3
    if result == (height, width, channels):
        return image
    check_size("the images", n * math.prod(result), wanted.scratch)
    return store((fit(as_pillow(pixels), wanted, done) for pixels in image), (n, *result), wanted.scratch)


def read_image(path: Path, wanted: Preparation, done: Counter) -> UInt8[np.ndarray, "height width channel"]:
    """The pixels of a file's first frame, upright, transparency laid on white. Raises ValueError with the reason."""
    from PIL import Image, ImageOps

    if not path.is_file():  # reading a pipe would block
        raise ValueError("it is not a regular file")
    if path.suffix.lower() in UNREADABLE:
        raise ValueError(f"{path.suffix.lower()[1:]} is not supported, but {', '.join(FORMATS)} are")
    try:
        with warnings.catch_warnings():
            # Pillow's limit against decompression bombs.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path, formats=FORMATS)
        with image:
            mode, several = image.mode, image.format != "MPO" and getattr(image, "is_animated", False)
            if mode[0] in "IF":
                raise ValueError("it has more than 8 bits a channel: convert it to 8")
            if wanted.size:
                image.draft(None, (DRAFT * wanted.size,) * 2)
            turned = image.getexif().get(ORIENTATION) in range(2, 9)
            upright = ImageOps.exif_transpose(image)
            clear = upright.has_transparency_data and upright.convert("RGBA").getchannel("A").getextrema()[0] < 255
            if clear:
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
            upright = upright.convert("L" if mode in ("1", "L", "LA") else "RGB")
            if (image.format in NEVER_GREY or mode in ("P", "PA")) and is_grey(upright):
                upright = upright.convert("L")
    except Exception as error:  # damage raises anything from OSError to SyntaxError
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from error
    marks = {TURNED: turned, "laid on white": clear, "reduced to the first frame": several}
    done.update(what for what, holds in marks.items() if holds)
    return fit(upright, wanted, done)


def is_grey(image: Any) -> bool:
    """Whether the channels of a Pillow image are equal."""
    first, *others = (band.tobytes() for band in image.split())
    return all(band == first for band in others)


def read_files(
    files: Sequence[Path], name: str, wanted: Preparation, skip_unreadable: bool, way_out: str, resize: str
) -> tuple[list[int], UInt8[np.ndarray, "n height width channel"], list[str]]:
    """Read image files; returns the positions of those read, their images, and notes on what was done.

    Grey images among coloured ones become coloured. Raises ValueError, naming the files, for images of different sizes,
    and for files that cannot be read unless `skip_unreadable` leaves them out; `resize` and `way_out` are its advice.
    """
    shapes: dict[int, tuple[int, ...]] = {}  # of those read
    problems: dict[int, ValueError] = {}
    done: Counter = Counter()
    check_size(name, len(files) * wanted.size**2 * (1 if wanted.colour == "grey" else 3), wanted.scratch)
    with tempfile.TemporaryFile(dir=wanted.scratch) if wanted.scratch else io.BytesIO() as stream:
        for i, path in enumerate(files):
            try:
                pixels = read_image(path, wanted, done)
            except ValueError as error:
                problems[i] = error
                continue
            if not shapes and not wanted.size:
                check_size(name, len(files) * pixels.size, wanted.scratch)
            shapes[i] = pixels.shape
            first = next(iter(shapes))
            if pixels.shape[:2] != shapes[first][:2]:
                sizes = [f"{width}x{height}" for height, width, _ in (pixels.shape, shapes[first])]
                raise ValueError(f"{path} is {sizes[0]}, but {files[first]} is {sizes[1]}: {resize}")
            stream.write(pixels)
        bad = [files[i] for i in problems]
        if problems and not (skip_unreadable and shapes):
            reason = next(iter(problems.values()))
            others = f"; nor can {len(bad) - 1} more of {len(files)} be read: {some(bad[1:])}" if bad[1:] else ""
            raise ValueError(f"cannot read the image {bad[0]}: {reason}{others}: {way_out}")
        stream.seek(0)
        image = same_channels(shapes.values(), stream, done, wanted.scratch)
    notes = [f"{count} {what}" for what, count in sorted(done.items())]
    if bad:
        notes.append(f"{len(bad)} of {len(files)} left out as unreadable ({some(bad)})")
    return [*shapes], image, notes


def same_channels(
    shapes: Collection[tuple[int, ...]], stream: io.BufferedIOBase, done: Counter, scratch: Path | None
) -> UInt8[np.ndarray, "n height width channel"]:
    """Stack the images of a stream, of one size, into one array; grey images become coloured if any is coloured."""
    height, width, _ = next(iter(shapes))
    coloured = any(shape[2] == 3 for shape in shapes)
    common = height, width, 3 if coloured else 1

    def rows():
        for shape in shapes:
            if coloured and shape[2] == 1:
                done["made colour"] += 1
            pixels = np.frombuffer(stream.read(math.prod(shape)), np.uint8)
            yield np.broadcast_to(pixels.reshape(shape), common)

    return store(rows(), (len(shapes), *common), scratch)


def some(paths: Sequence[Path | str]) -> str:
    """The names of the first few files, and the number of the others."""
    names = [Path(path).name.replace("\n", " ") for path in paths[:NAMED]]
    return ", ".join(names) + (f" and {len(paths) - NAMED} more" if len(paths) > NAMED else "")
