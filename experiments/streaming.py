"""The cost of sending the images of each call, relative to images that stay on the device.

    python -m experiments.streaming [--rounds=7] [--calls=3] [--size=60000]

The post's VAE, random images of 28x28, batches of 128, calls of 20 steps. All are compiled first, then timed in turn,
round by round, in one process; a ratio is the median of the rounds' ratios.
"""

import tempfile
from pathlib import Path

import numpy as np
from absl import flags

from configs import vae
from experiments import launch
from experiments.costs import make_run
from experiments.speed import Peer, machine, measure, median_and_range
from vae_jax.batch import Split
from vae_jax.run import session
from vae_jax.run.feed import resident, streamed
from vae_jax.run.job import Job
from vae_jax.run.report import markdown_table


def make_job(image: np.ndarray) -> Job:
    """The training of `configs/vae.py` on these images."""
    job = session.build(vae.get_config("digits").to_dict() | {"batch_size": 128})
    train = Split(image, np.zeros(len(image), np.int32))
    return job._replace(dataset=job.dataset._replace(splits=job.dataset.splits | {"train": train}))


def main() -> None:
    given = flags.FLAGS
    held = given.size // (128 * 20)
    if given.calls > held:
        raise ValueError(
            f"--calls is {given.calls}, but an epoch of {given.size} images holds {held}: give fewer, or a larger "
            "--size"
        )
    image = np.random.default_rng(0).integers(0, 256, (given.size, 28, 28, 1), np.uint8)
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder) / "image.npy", image)
        mapped = np.load(Path(folder) / "image.npy", mmap_mode="r")
        feeds = {
            "on the device": (image, resident),
            "streamed from memory": (image, streamed),
            "streamed from a mapped file": (mapped, streamed),
        }
        peers = []
        for name, (images, make_feed) in feeds.items():
            job = make_job(images)
            work = given.calls * job.steps_per_call * job.batch_size
            peers.append(Peer("training", name, make_run(job, make_feed, given.calls), work))
        rates = measure(peers, given.rounds)
    cells = [["images", "images/s", "times the first", "lowest round", "highest round"]]
    for peer, own in zip(peers, rates):
        numbers = (f"{value:.2f}" for value in median_and_range(own / rates[0]).values())
        cells.append([peer.name, f"{np.median(own):,.0f}", *numbers])
    print(f"{markdown_table(cells)}\n\n{machine()}; {given.rounds} rounds")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 7, "Rounds.", lower_bound=1)
    flags.DEFINE_integer("calls", 3, "Calls in a round; an epoch must hold them.", lower_bound=1)
    flags.DEFINE_integer("size", 60_000, "Images.", lower_bound=2560)
    launch.start("streaming", main)
