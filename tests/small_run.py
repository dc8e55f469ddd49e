"""A training that takes a second, the start of every test of the loop and of what follows it; how to stop, damage and
compare runs.

Jobs of one config, and runs of one job, share what is compiled, which takes most of the second.
"""

import contextlib
import copy
import itertools
import json

import jax
import numpy as np

from configs import vae
from vae_jax.run import loop, session
from vae_jax.run.checkpoint import Checkpoints
from vae_jax.run.config import make_config
from vae_jax.run.directory import RunDirectory
from vae_jax.run.log import read_rows
from vae_jax.run.loop import train
from vae_jax.run.progress import Progress

JOBS, PROGRAMS = {}, {}
MAKE_PROGRAMS = loop.make_programs


def make_programs(job, devices):
    """`loop.make_programs`, cached by its functions, data and sizes."""
    parts = job.objective, job.optimizer, job.init, job.prepare, job.probes, job.dataset
    sizes = job.seeds, job.batch_size, job.steps_per_call, job.ema_decay, job.groups, devices.count
    key = *map(id, parts), *sizes
    if key not in PROGRAMS:
        PROGRAMS[key] = MAKE_PROGRAMS(job, devices), parts  # kept alive, so that no other object gets their ids
    return PROGRAMS[key][0]


loop.make_programs = make_programs


def small_job(changes=None, drawn=False, **run):
    """Two epochs of five steps of a small VAE on the bundled digits; figures are drawn only with `drawn`.

    `changes` maps dotted fields of its config to values, and `run` fields of the section run.
    """
    fields = {"epochs": 2, "batch_size": 256, "optimizer.ema_decay": 0.9}
    fields |= {"model.encoder_features": (4, 4), "model.decoder_features": (4, 4)}
    fields |= {f"run.{name}": value for name, value in run.items()} | (changes or {})
    config = make_config("vae", vae.BASE | vae.VARIANTS["smoke"], {"small": fields}, "small").to_dict()
    key = json.dumps(config)
    job = JOBS[key] = JOBS.get(key) or session.build(copy.deepcopy(config))
    return job if drawn else job._replace(figures=lambda *_: {}), config


def run_job(job, config, path, stop=lambda: False, devices=None, routed=False):
    """Train in the run directory `path`; returns the last state and the directory, closed.

    Only with `routed` the summary says which term trains which network, since that takes seconds to compile.
    """
    job = job if routed else job._replace(terms=())
    directory = RunDirectory(str(path), config, "python -m vae_jax.main")
    folder = directory.path / "checkpoints"
    checkpoints = Checkpoints(folder, job.metadata, job.run.keep, job.best)
    try:
        progress = Progress(1, job.epochs)
        progress.reported = contextlib.nullcontext  # a figure that fails ends the test
        state = train(job, directory, checkpoints, progress, stop, devices)
    finally:
        directory.close()
    return state, directory


def stop_after(calls):
    """A `stop`, asked after each call of the compiled program, that answers yes from the given call on."""
    return itertools.chain([False] * (calls - 1), itertools.repeat(True)).__next__


def assert_same_state(state, other):
    """Two training states have the same bits."""
    state, other = (jax.device_get(each.replace(key=jax.random.key_data(each.key))) for each in (state, other))
    jax.tree.map(np.testing.assert_array_equal, state, other)


def without_time(rows):
    """Rows of a log without what differs between equal runs."""
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def rows_of(path):
    """The rows of a run directory, without time."""
    return without_time(read_rows(path))


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 16
    path.write_bytes(bytes(content))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1])


def empty(path):
    path.write_bytes(b"")
