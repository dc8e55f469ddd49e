"""Load the metadata and the variables of a model from a run directory or an exported folder."""

import jax

from vae_jax import weights
from vae_jax.families import FAMILIES, Model
from vae_jax.run import checkpoint
from vae_jax.run.config import bind, changes, choose, fill_in, with_defaults
from vae_jax.run.directory import check_same_config, read_config
from vae_jax.run.files import check_local, local_path


def load_variables(workdir: str, which: str | int = "") -> tuple[dict, dict]:
    """Load a checkpoint's metadata and its variables; with several seeds, variables have a leading seed axis.

    Raises ValueError as `load` does, and if the run's config.json differs from the checkpoint's config.
    """
    check_local(workdir, "vae_jax.load")
    if weights.is_exported(local_path(workdir)):
        return load_exported(workdir, which)
    metadata, variables = checkpoint.load(local_path(workdir) / "checkpoints", which, seeded_shapes)
    metadata["config"] = with_defaults(metadata["config"])
    try:
        stored = read_config(str(local_path(workdir))) or metadata["config"]
    except OSError as error:
        if str(which) == str(metadata["step"]):  # chosen by its step
            return metadata, variables
        raise ValueError(f"{error}; so the latest checkpoint is unknown: restore the file, or choose a step") from error
    if changed := changes(metadata["config"] | {"epochs": stored["epochs"]}, stored):
        raise ValueError(
            f"config.json in {workdir} is not what checkpoint {metadata['step']} was trained with "
            f"({'; '.join(changed)}): restore the one or the other"
        )
    return metadata, variables


def load_exported(workdir: str, which: str | int = "") -> tuple[dict, dict]:
    """Load the metadata and the variables of an exported model; config fields added since then get their defaults."""
    metadata, variables = weights.read(local_path(workdir))
    if str(which) not in ("", "latest", "best", str(metadata["step"])):
        raise ValueError(f"there is no checkpoint {which!r} in {workdir}: it holds only step {metadata['step']}")
    metadata["config"] = with_defaults(metadata["config"])
    like = seeded_shapes(metadata)
    found, expected = (jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree) for tree in (variables, like))
    if found != expected:
        raise ValueError(f"the weights in {workdir} are not those of the model in its config.json: export it again")
    return metadata, variables


def stored_config(workdir: str) -> dict | None:
    """The config of a run or an exported model; None if there is none. Raises ValueError or OSError for damage."""
    if weights.is_exported(local_path(workdir)):
        return with_defaults(weights.read(local_path(workdir))[0]["config"])
    config = read_config(workdir)
    return config and with_defaults(config)


def check_config(workdir: str, stored: dict, config: dict) -> None:
    """Raise ValueError unless a config is the `stored_config` of `workdir`, but for where an exported model's data lie,
    whose SHA-256 is checked instead.
    """
    if weights.is_exported(local_path(workdir)):
        stored = stored | {"data": stored["data"] | {"name": config["data"]["name"]}}
    check_same_config(workdir, stored, config)


def seeded_shapes(metadata: dict) -> dict:
    """The shapes of a checkpoint's variables, with a leading seed axis if there are several seeds."""
    like = jax.eval_shape(make_model(metadata).init, jax.random.key(0))
    seeds = metadata["config"]["seeds"]
    if seeds == 1:
        return like
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), like)


def make_model(metadata: dict) -> Model:
    """The model that a checkpoint's metadata describes."""
    family, values = choose("model", FAMILIES, metadata["config"]["model"])
    make = bind("model", family.make, values)
    shape = tuple(metadata["image_shape"])
    return fill_in(make, image_shape=shape, num_classes=metadata["num_classes"])
