"""A training that takes a second: what tests of the loop and of what comes after it begin with."""

from configs import vae
from vae_jax.run import session
from vae_jax.run.checkpoint import Checkpoints
from vae_jax.run.directory import RunDirectory
from vae_jax.run.loop import train
from vae_jax.run.progress import Progress


def small_job(changes=None, drawn=False, **run):
    """Two epochs of five steps of a small VAE on the bundled digits; nothing is drawn unless asked for."""
    config = vae.get_config("smoke").to_dict()
    config |= {"epochs": 2, "batch_size": 256} | (changes or {})
    config["model"] |= {"encoder_features": (4, 4), "decoder_features": (4, 4)}
    config["optimizer"] |= {"average": 0.9}
    config["run"] |= run
    job = session.build(config)
    return job if drawn else job._replace(report=lambda *_: (dict, {})), config


def run_job(job, config, path, stop=lambda: False, devices=None):
    directory = RunDirectory(str(path), config, "python -m vae_jax.main")
    folder = directory.path / "checkpoints"
    checkpoints = Checkpoints(folder, job.about, job.run.keep, job.best)
    try:
        progress = Progress(1, job.epochs)
        state = train(job, directory, checkpoints, progress, stop, devices)
    finally:
        checkpoints.close()
        directory.close()
    return state, directory
