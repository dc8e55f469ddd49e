"""`run.log_to`: what TensorBoard and a tracker of W&B's shape get, that a resumed run is one run, and that no logger
ends a training.
"""

import importlib
import struct
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from unittest.mock import Mock

import pytest
from matplotlib.figure import Figure
from small_run import run_job, small_job
from tensorboardX.proto.event_pb2 import Event

from vae_jax.run.config import RunOptions
from vae_jax.run.directory import RunDirectory
from vae_jax.run.files import save_figure
from vae_jax.run.loggers import Loggers, import_loggers


def directory_of(path, remote=None):
    """What the loggers ask of a run directory."""
    return Mock(RunDirectory, path=path, remote=remote, config={"seed": 3, "model": {"features": (4, 4)}})


class FakeTracker(ModuleType):
    """A stand-in for the module wandb or trackio that records what it gets; the call named `broken` raises."""

    __file__ = "somewhere"

    def __init__(self, name, broken=None):
        super().__init__(name)
        self.__spec__, self.broken = ModuleSpec(name, None), broken
        self.inits, self.logged, self.finished = [], [], 0

    def init(self, **given):
        self.raise_at("init")
        self.inits.append(given)
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, numbers, step):
        self.raise_at("log")
        self.logged.append((step, numbers))

    def finish(self):
        self.raise_at("finish")
        self.finished += 1

    def Image(self, path):
        return "image", path

    def raise_at(self, what):
        if self.broken == what:
            raise ConnectionError("no network\nand more")


@pytest.fixture
def trackers(monkeypatch):
    """`trackers(name, broken)` installs a fake package."""

    def install(name, broken=None):
        fake = FakeTracker(name, broken)
        monkeypatch.setitem(sys.modules, name, fake)
        monkeypatch.delenv(f"{name.upper()}_PROJECT", raising=False)
        return fake

    return install


def events(folder):
    """(step, tag) of what the event files in a folder hold."""
    found = []
    for file in sorted(folder.iterdir()):
        content = file.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])  # then 4 bytes of checksum, the event, 4 bytes of checksum
            event, content = Event.FromString(content[12 : 12 + size]), content[16 + size :]
            found += [(event.step, value.tag) for value in event.summary.value]
            found += [(event.step, "start")] * event.HasField("session_log")
    return found


def draw(*_):
    return {"one": lambda: Figure(figsize=(1, 1))}


def test_a_training_is_logged_everywhere_and_continues_as_the_same_run(trackers, tmp_path):
    """Stopped at step 4; each row of metrics.jsonl goes to each logger, and the figures of both epochs."""
    fakes = [trackers("wandb"), trackers("trackio")]
    job, config = small_job(log_to="tensorboard, wandb,trackio", steps_per_call=2)
    job, path = job._replace(figures=draw), tmp_path / "run"
    run_job(job, config, path, stop=iter([False, True]).__next__)
    _, directory = run_job(job, config, path)
    rows = [
        (row["step"], {name: value for name, value in row.items() if "/" in name and not isinstance(value, list)})
        for row in directory.history
    ]
    picture = {"figures/one": ("image", str(path / "figures" / "one.png"))}
    expected = [entry for row in rows for entry in [row] + [(row[0], picture)] * ("test/loss" in row[1])]
    key = (path / "log_id").read_text()
    assert len(key) == 8
    for fake in fakes:
        assert fake.logged == expected and fake.finished == 2
        first, second = fake.inits
        assert first == second
        assert first["config"]["epochs"] == 2 and first["resume"] == "allow" and first["project"] == "vae_jax"
    assert fakes[0].inits[0]["id"] == key and fakes[0].inits[0]["name"] == "run"
    assert fakes[0].inits[0]["dir"] == str(path)
    assert fakes[1].inits[0]["name"] == f"run-{key}" and "id" not in fakes[1].inits[0]
    board = events(path / "tensorboard")
    assert [entry for entry in board if entry[1] == "start"] == [(1, "start"), (5, "start")]  # what follows is purged
    assert [entry for entry in board if entry[1] == "train/loss"] == [
        (step, "train/loss") for step in (2, 4, 5, 7, 9, 10)
    ]
    assert [entry for entry in board if entry[1] == "figures/one"] == [(5, "figures/one"), (10, "figures/one")]


@pytest.mark.parametrize("broken", ["init", "log", "finish"])
def test_a_tracker_without_network_is_reported_once_and_left_out(trackers, tmp_path, broken):
    fake, well, said = trackers("wandb", broken), trackers("trackio"), []
    save_figure(Figure(figsize=(1, 1)), tmp_path / "one.png")
    loggers = Loggers("wandb,trackio", directory_of(tmp_path), 0, said.append)
    for step in (1, 2):
        loggers.log({"step": step, "epoch": 1.0, "seconds": 1, "train/loss": 2.0, "test/list": [1.0]})
    loggers.show(2, tmp_path)
    loggers.close()
    loggers.close()
    said_once = "wandb cannot be logged to (ConnectionError: no network): the training goes on without it"
    assert said == [said_once]
    image = {"figures/one": ("image", str(tmp_path / "one.png"))}
    assert well.logged == [(1, {"train/loss": 2.0}), (2, {"train/loss": 2.0}), (2, image)]
    assert fake.logged == (well.logged if broken == "finish" else [])


def test_the_project_may_be_named_in_the_environment(trackers, tmp_path, monkeypatch):
    fake = trackers("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    Loggers("wandb", directory_of(tmp_path), 0, print).close()
    assert fake.inits[0]["project"] == "mine"


def test_a_run_on_cloud_storage_keeps_its_id(trackers, tmp_path):
    """A folder stands in for gs://; the local folder is another one at each start."""
    fake, remote = trackers("wandb"), tmp_path / "remote"
    remote.mkdir()
    for local in (tmp_path / "a", tmp_path / "b"):
        local.mkdir()
        Loggers("wandb", directory_of(local, remote), 0, print).close()
        if not (remote / "log_id").exists():
            (remote / "log_id").write_text((local / "log_id").read_text())
    assert fake.inits[0]["id"] == fake.inits[1]["id"] and fake.inits[0]["name"] == "remote"


def test_bad_names_and_missing_packages_are_refused(trackers, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"unknown logger 'wandbb' in run.log_to: did you mean wandb\?"):
        RunOptions(log_to="wandbb")
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(ValueError, match="wandb in run.log_to needs wandb, which is not installed: pip install wandb"):
        RunOptions(log_to="tensorboard,wandb")
    monkeypatch.delitem(sys.modules, "wandb")
    (tmp_path / "wandb").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="wandb in run.log_to needs its package, not the folder wandb here"):
        import_loggers("wandb")
    assert import_loggers("") == {}
