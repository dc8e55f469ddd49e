"""Alternatives to this package: seconds and memory of the same VAE, trained and evaluated by each framework's trainer.

    python -m experiments.frameworks --workdir=runs/frameworks [--data=mnist] [--epochs=5] [--rounds=3]

All train the post's network with Adam (0.001) on shuffled batches of 128, from images in memory, and compute the test
loss after each epoch. Each training is a fresh process on the CPU, timed from images in memory to the last test loss,
with compilation and without imports. Ours also reads the data set, draws its figures and writes its checkpoints and
summary. Rounds go through all peers in turn, so ratios hold even if the machine's speed drifts. Peers that are not
installed are left out. The same command resumes.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import time

import numpy as np
from absl import flags

from experiments import framework_peers, launch
from experiments.speed import machine, median_and_range
from experiments.study import compute_once, open_study, settings_of
from vae_jax import data
from vae_jax.full_evaluation.subject import as_floats
from vae_jax.run.files import local_path
from vae_jax.run.report import markdown_table

PEERS = {  # name -> (required modules, function, environment)
    "vae_jax": (("vae_jax",), framework_peers.ours, {}),
    "plain Flax": (("flax",), framework_peers.plain_flax, {}),
    "plain PyTorch": (("torch",), framework_peers.plain_torch, {}),
    "PyTorch Lightning": (("lightning",), framework_peers.lightning, {}),
    "pythae": (("torch", "pythae.models", "pythae.pipelines", "pythae.trainers"), framework_peers.pythae, {}),
    "Keras on JAX": (("keras",), framework_peers.keras, {"KERAS_BACKEND": "jax"}),
    "Keras on PyTorch": (("keras", "torch"), framework_peers.keras, {"KERAS_BACKEND": "torch"}),
}
CHILD = "VAE_JAX_PEER"


def train_here(peer: str) -> dict[str, float]:
    """Train one peer in this process; returns its seconds, the MiB that training adds to the peak of the process's
    memory, which holds the imported modules and the images, and its last test loss.
    """
    given = flags.FLAGS
    modules, function, _ = PEERS[peer]
    for module in modules:
        importlib.import_module(module)
    train = test = np.zeros((0, 28, 28, 1), np.float32)  # ours reads its images itself
    if peer != "vae_jax":
        splits = data.load(given.data, manual_dir=given.manual_dir).splits
        train, test = (as_floats(splits[name].image) for name in ("train", "test"))
    fields = {"name": given.data, "manual_dir": given.manual_dir}
    before, start = peak_mebibytes(), time.perf_counter()
    loss = function(train, test, given.epochs, fields)
    seconds = time.perf_counter() - start
    return {"training_seconds": seconds, "added_mebibytes": peak_mebibytes() - before, "test_loss": float(loss)}


def peak_mebibytes() -> float:
    """The most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def train_in_fresh_process(peer: str, round_number: int) -> dict[str, float]:
    """Run `train_here` in a new process. Raises ValueError with its last line if it fails."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""} | PEERS[peer][2] | {CHILD: peer}
    command = [sys.executable, "-m", "experiments.frameworks", *sys.argv[1:]]
    done = subprocess.run(command, check=False, env=env, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{peer} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def installed() -> list[str]:
    """The installed peers; prints which ones are left out."""
    found = [
        peer
        for peer, (modules, *_) in PEERS.items()
        if all(importlib.util.find_spec(module.partition(".")[0]) for module in modules)
    ]
    if left_out := [peer for peer in PEERS if peer not in found]:
        print(f"not installed, and left out: {', '.join(left_out)}")
    return found


def table(rows: list[dict]) -> list[list[str]]:
    """One row per peer: medians with the lowest and the highest value.

    The ratio to our time compares trainings of the same round.
    """
    ours = {row["round_number"]: row["training_seconds"] for row in rows if row["peer"] == "vae_jax"}
    cells = [["trainer", "seconds", "times ours", "memory added, MiB", "test loss"]]
    for peer in PEERS:
        own = [row for row in rows if row["peer"] == peer and row["round_number"] in ours]
        if own:
            ratios = [row["training_seconds"] / ours[row["round_number"]] for row in own]
            seconds, memory = ([row[name] for row in own] for name in ("training_seconds", "added_mebibytes"))
            loss = statistics.median(row["test_loss"] for row in own)
            cells.append(
                [peer, spread(seconds, ".0f"), spread(ratios, ".2f"), f"{statistics.median(memory):.0f}", f"{loss:.2f}"]
            )
    return cells


def spread(values: list[float], digits: str) -> str:
    """The median, with the lowest and the highest value."""
    median, low, high = median_and_range(np.array(values)).values()
    return f"{median:{digits}} ({low:{digits}}-{high:{digits}})"


def versions() -> str:
    """The versions of the installed frameworks."""
    names = ("jax", "flax", "torch", "lightning", "pythae", "keras")
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in names if importlib.util.find_spec(name))


def main() -> None:
    given = flags.FLAGS
    if peer := os.environ.get(CHILD):
        print(json.dumps(train_here(peer)))
        return
    peers = installed()
    settings = settings_of(given.data, data.load(given.data, manual_dir=given.manual_dir))
    settings |= {"epochs": given.epochs, "versions": versions(), "machine": machine()}
    study = open_study(local_path(given.workdir), settings)
    try:
        for number in range(given.rounds):
            for peer in peers:
                compute_once(study, "training", train_in_fresh_process, peer=peer, round_number=number)
        cells = markdown_table(table([row for row in study.rows if row["round_number"] < given.rounds]))
    finally:
        study.close()
    cores = len(os.sched_getaffinity(0))
    note = f"{cores} CPU cores, {versions()}; medians of {given.rounds} rounds, with the lowest and the highest."
    title = f"{given.epochs} epochs of {given.data}, batch 128, evaluation included"
    launch.write_summary(study.path, title, cells, note)


if __name__ == "__main__":
    launch.define_data_flags("runs/frameworks")
    flags.DEFINE_integer("epochs", 5, "Epochs of each training.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Rounds through all peers; more can be added later.", lower_bound=1)
    launch.start("frameworks", main)
