"""Build the job that a config describes, and train it in a run directory."""

import itertools
import shlex
import sys
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from vae_jax.batch import binarize, mean_image, named_key
from vae_jax.data import load
from vae_jax.families import FAMILIES, Family
from vae_jax.nn import bfloat16
from vae_jax.optimizers import OPTIMIZERS, ema
from vae_jax.run import hosts
from vae_jax.run.checkpoint import Checkpoints
from vae_jax.run.config import (
    RunOptions,
    argument_docs,
    bind,
    choose,
    fields,
    fill_in,
    make_title,
    nearest,
    signatures,
    with_defaults,
)
from vae_jax.run.devices import Devices, enable_compilation_cache
from vae_jax.run.directory import SECTIONS, RunDirectory, check_same_config, read_config
from vae_jax.run.environment import environment
from vae_jax.run.evaluate import as_seen
from vae_jax.run.files import check_reachable, explained
from vae_jax.run.job import Job, check_data, describe_batches, describe_data, describe_numbers, fingerprint
from vae_jax.run.log import LogDigest, read_rows
from vae_jax.run.loop import train
from vae_jax.run.memory import check_fits
from vae_jax.run.progress import Progress
from vae_jax.run.stored import check_same_data, latest_saved, survey


def build(config: Mapping[str, Any]) -> Job:
    """Build the job that a config describes.

    Each section is passed by keyword to one signature: `data.load`, the family's `make` and `make_objective`, the
    optimizer's, `RunOptions`. The config in the job's metadata has the chosen batch size in place of 0. Raises
    ValueError or OSError, in one line that names the field, for anything wrong.
    """
    filled = with_defaults(config)
    config = {name: filled[name] for name in config}
    job = bind("", make_job, config)()
    return job._replace(metadata=job.metadata | {"config": {**config, "batch_size": job.batch_size}})


def make_job(
    *,
    seed: int,
    seeds: int,
    epochs: int,
    batch_size: int,
    best: str,
    patience: int = 0,
    data: Mapping,
    model: Mapping,
    objective: Mapping,
    optimizer: Mapping,
    run: Mapping,
) -> Job:
    """`build` with the config's fields as arguments.

    Args:
        seed: seed of initial weights, noise and order of the examples; it determines the run.
        seeds: number of seeds, from `seed` on, that are trained together in one program.
        epochs: passes over the training images.
        batch_size: images per training step; 0: 64, or a quarter of the training images if there are fewer than 256.
        best: the validation metric that selects the best checkpoint, if there are validation images.
        patience: epochs without a better value of that metric after which training ends; 0: it never ends early.
    """
    check_counts(seed, seeds, epochs, batch_size, patience)
    # Check every section before using the first one: an error in the last is reported before data are read.
    bound = bind_sections(data, model, objective, optimizer, run)
    family = bound.family
    better = direction_of(best, family)
    dataset = bound.load_data()
    batch_size = check_data(family, dataset, batch_size, patience, **bound.make_model.keywords)
    known = describe_data(dataset) | describe_batches(dataset, batch_size)
    known["model"] = net = fill_in(bound.make_model, **known)
    known |= bound.make_objective.keywords | {"image": dataset.splits["train"].image}
    pixel_mean = mean_image(known["image"]).astype(np.float32)
    title, samples = make_title(family, data["name"]), named_key(jax.random.key(seed), "samples")
    job = Job(
        title=title,
        seeds=range(seed, seed + seeds),
        epochs=epochs,
        batch_size=batch_size,
        dataset=dataset,
        model=net,
        init=jax.jit(lambda key: net.init(named_key(key, "init"), pixel_mean)),  # traced once
        objective=fill_in(bound.make_objective, **known),
        probes=family.make_probes(net),
        final_probes=family.make_final_probes(net, bound.options.likelihood_samples, dataset.binarize),
        prepare=partial(binarize, how=dataset.binarize),
        decodes_per_example=fill_in(family.decodes_per_example, **known),
        optimizer=bound.make_optimizer(steps=epochs * known["steps_per_epoch"], batch_size=batch_size),
        ema_decay=bound.ema_decay,
        best=(f"validation/{best}", better) if "validation" in dataset.splits else None,
        baselines=cache(partial(fill_in, family.baselines, **bound.make_model.keywords | known)),
        ledger=partial(describe_numbers, family, bound.make_model.keywords | known, dataset, pixel_mean),
        figures=family.make_figures(net, as_seen(dataset.splits["test"], dataset.binarize, seed), samples, title),
        metadata=describe_data(dataset) | {"data": fingerprint(dataset)},
        run=bound.options,
    )
    return job._replace(groups=bound.groups, terms=bound.terms, metrics=family.METRICS, patience=patience)


class Sections(NamedTuple):
    """The config's sections, bound to the functions that take them."""

    load_data: partial
    family: Family
    make_model: partial
    make_objective: partial
    make_optimizer: partial
    groups: tuple[str, ...]
    terms: tuple[str, ...]
    ema_decay: float
    options: RunOptions


def bind_sections(data: Mapping, model: Mapping, objective: Mapping, optimizer: Mapping, run: Mapping) -> Sections:
    """Check names, types, and the ranges that do not depend on data. Raises ValueError, naming the field."""
    family, of_model = choose("model", FAMILIES, model)
    make_optimizer, of_optimizer = choose("optimizer", OPTIMIZERS, optimizer)
    of_average = {name: of_optimizer.pop(name) for name in fields(ema) if name in of_optimizer}
    groups = getattr(family, "GROUPS", ())
    make_optimizer = partial(fill_in, bind("optimizer", make_optimizer, of_optimizer), groups=groups)
    make_optimizer(steps=1, batch_size=1)  # checks the ranges
    return Sections(
        load_data=bind("data", load, data),
        family=family,
        make_model=bind("model", family.make, of_model),
        make_objective=bind("objective", family.make_objective, objective),
        make_optimizer=make_optimizer,
        groups=groups,
        terms=getattr(family, "TERMS", ()),
        ema_decay=bind("optimizer", ema, of_average)(),
        options=bind("run", RunOptions, run)(),
    )


def check_counts(seed: int, seeds: int, epochs: int, batch_size: int, patience: int) -> None:
    """Raise ValueError for a top-level number out of range."""
    counts = {"seeds": (seeds, 1), "epochs": (epochs, 1), "batch_size": (batch_size, 0), "patience": (patience, 0)}
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} is {value}, but must be at least {least}")
    if not 0 <= seed <= 2**32 - seeds:
        raise ValueError(f"seed is {seed}, but must lie in [0, 2**32 - seeds]")


def direction_of(best: str, family: Family) -> str:
    """The better direction of the metric `best`. Raises ValueError if the family has no such metric to rank by."""
    known = {name: metric.better for name, metric in family.METRICS.items()}
    known = {name: better for name, better in known.items() if better}
    if best not in known:
        raise ValueError(f"unknown metric best {best!r}: {nearest(best, known)}")
    return known[best]


def describe(family: str = "") -> list[tuple[str, str]]:
    """Every config field, as the first function that takes it describes it; those of `family` come first."""
    docs = argument_docs(make_job)
    described = {name: docs[name] for name, taken in fields(make_job).items() if taken.annotation is not Mapping}
    names = {"model": FAMILIES, "optimizer": OPTIMIZERS}
    families = sorted(FAMILIES, key=family.__ne__)
    for section in SECTIONS:
        if section in names:
            described[f"{section}.name"] = f"one of {', '.join(names[section])}"
        for one, optimizer in itertools.product(families, OPTIMIZERS):
            for function in signatures(FAMILIES[one], optimizer)[section]:
                docs = argument_docs(function)
                for name in fields(function):
                    described[f"{section}.{name}"] = described.get(f"{section}.{name}") or docs.get(name, "")
    return [*described.items()]


class Outcome(NamedTuple):
    """How a training ended."""

    step: int
    steps: int  # of the full training, or of one that ran out of patience
    summary: Any  # the path of summary.md
    signal: int = 0  # the signal that stopped it, 0 for none


def run(config: Mapping, workdir: str, device_limit: int, make_stop: Callable[[], Any]) -> Outcome | None:
    """Start or resume a training in a run directory; returns None if the training there is already finished.

    Every host must call this. `make_stop()` returns a `hosts.Stop` or similar; it is called just before the training.
    Raises ValueError or OSError, in one line, for bad input and for a directory that cannot be used, and
    FloatingPointError for numbers that are not finite.
    """
    hosts.check_hosts_agree(hosts.host_facts(config, device_limit))
    with hosts.raise_on_all_hosts():
        bind("", make_job, config)  # names a missing section or field before anything reads it
        devices = Devices(device_limit, config["model"].get("precision"))
        check_reachable(workdir)
        folder = epath.Path(workdir).expanduser() / "checkpoints"
        if devices.is_primary and (stored := read_config(workdir)) is not None:
            check_same_config(workdir, stored, config)
        job = build(config)
        check_fits(job, jax.local_devices()[0], devices.count)
        config = job.metadata["config"]
        devices.check_divide(job.batch_size)
        finished = devices.is_primary and is_finished(job, workdir, folder)
    if hosts.gather(finished)[0]:
        return None
    hosts.check_hosts_agree({"data": job.metadata["data"]})
    writers = [hosts.NotPrimary()] * 3
    with hosts.raise_on_all_hosts():
        if devices.is_primary:
            writers = open_run(job, workdir, folder, config, devices.count)
    directory, checkpoints, progress = writers
    failed = f"cannot continue in the work directory {workdir}"
    with (
        closing(directory),
        closing(progress),
        explained(failed, "the same command continues once it can be written to"),
    ):
        if job.run.compilation_cache:
            enable_compilation_cache()
        stop = make_stop()
        state = train(job, directory, checkpoints, progress, stop, devices)
        # This also waits: a host that exits while the primary still saves would end the primary.
        stopped_early = hosts.gather(checkpoints.stopped_early)[0]
    step = int(state.step.max())
    return Outcome(step, step if stopped_early else job.steps, directory.summary, stop.signal)


def is_finished(job: Job, workdir: str, folder) -> bool:
    """Whether a run has reached its last step or run out of patience, with nothing damaged that a start would repair.

    Raises ValueError or OSError if its checkpoints belong to another config or to other data.
    """
    kept, damaged = survey(folder)
    if not kept:
        return False
    latest = next(iter(kept.values()))
    check_same_data(latest, job.metadata)
    check_same_config(workdir, latest["config"], job.metadata["config"])
    if (latest["step"] < job.steps and not latest.get("stopped_early")) or damaged:
        return False
    if latest_saved(folder) != latest["step"]:
        return False
    return LogDigest(read_rows(folder.parent)).value() == latest["log"]


def open_run(job: Job, workdir: str, folder, config: Mapping, devices: int) -> tuple:
    """Open the run directory, its checkpoints and the progress display."""
    command = shlex.join(["python", "-m", "vae_jax.main", *sys.argv[1:]])
    metadata = job.metadata | {"environment": environment(devices)}
    with ExitStack() as undone:
        directory = undone.enter_context(closing(RunDirectory(workdir, config, command)))
        checkpoints = Checkpoints(folder, metadata, job.run.keep, job.best)
        undone.pop_all()
    progress = Progress(job.steps * job.batch_size * len(job.seeds), job.epochs)
    if job.dataset.notes:
        progress.note(f"the images of {config['data']['name']}: {'; '.join(job.dataset.notes)}")
    if config["model"].get("precision") == "bfloat16" and jax.default_backend() == "cpu" and not bfloat16.is_fast():
        progress.note("model.precision is bfloat16, which this processor does not multiply faster than float32")
    return directory, checkpoints, progress
