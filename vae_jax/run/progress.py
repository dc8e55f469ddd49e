"""What the terminal shows during training."""

import contextlib
import sys
import time
from collections.abc import Iterator

from tqdm import tqdm

from vae_jax.run.files import describe_error


class Progress:
    """A bar on a terminal; elsewhere one line per epoch, at most every `PAUSE` seconds.

    Args:
        images: training images of all epochs and seeds.
        epochs: epochs of the training.
    """

    PAUSE = 5.0

    def __init__(self, images: int, epochs: int):
        self._bar = tqdm(
            total=images, unit=" images", unit_scale=True, dynamic_ncols=True, disable=not sys.stderr.isatty()
        )
        self._left, self._done, self._epochs = images, 0, epochs
        self._started = self._printed = time.monotonic()
        self._tested = ""

    def skip(self, images: int) -> None:
        """Count images that an earlier process trained on; they do not count towards the speed."""
        self._left -= images
        self._bar.update(images)
        self._bar.unpause()

    def note(self, text: str) -> None:
        """Print a line on stderr."""
        self._bar.write(f"vae_jax: {text}", file=sys.stderr)

    def doing(self, what: str) -> None:
        """Show the current activity in the bar until the next training images are counted."""
        self._bar.set_postfix_str(what)

    @contextlib.contextmanager
    def reported(self, what: str) -> Iterator[None]:
        """Show the block as the current activity; report a failure and go on: no picture is worth a training."""
        self.doing(what)
        try:
            yield
        except Exception as error:  # noqa: BLE001
            self.note(f"{what} could not be made ({describe_error(error)})")

    def update(self, images: int, epoch: int, loss: float) -> None:
        """Count more training images; `epoch` counts from 1."""
        self._left -= images
        self._done += images
        self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
        self._bar.set_postfix_str(f"loss {loss:.2f}{self._tested}", refresh=False)
        self._bar.update(images)

    def epoch_done(self, epoch: int, metrics: dict, last: bool = False) -> None:
        """Show an epoch's metrics, including `train/loss` and `test/loss`; always for the first and the last epoch."""
        self._tested = f", test {metrics['test/loss']:.2f}"
        now = time.monotonic()
        if self._bar.disable and (now - self._printed > self.PAUSE or last or epoch == 1):
            losses = "  ".join(f"{name} {value:.3f}" for name, value in metrics.items() if name.endswith("/loss"))
            rate = self._done / (now - self._started)
            left = f"{self._left / rate / 60:.1f} min left"
            print(f"epoch {epoch}/{self._epochs}  {losses}  {rate:,.0f} images/s  {left}", flush=True)
            self._printed = now

    def close(self) -> None:
        self._bar.close()
