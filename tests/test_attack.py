"""Attacks on a run: changed files and a hostile environment. Nothing may change the numbers silently."""

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest
from program import fresh
from small_run import run_job, small_job, without_time

import vae_jax
from vae_jax import commands, figures, main
from vae_jax.run import session
from vae_jax.run.environment import differences, environment
from vae_jax.run.output import Output
from vae_jax.run.stored import steps

FLAGS = (
    "--config=configs/vae.py:smoke",
    "--config.batch_size=128",
    "--config.model.encoder_features=4,4",
    "--config.model.decoder_features=4,4",
    "--config.run.steps_per_call=3",
    "--config.run.save_every=4",
)


def validated(epochs):
    """A training of nine steps an epoch in three rows, with validation images and a checkpoint at every best epoch."""
    changes = {"epochs": epochs, "batch_size": 128, "best": "loss", "data.validation": 200}
    return small_job(changes, steps_per_call=3, save_every=4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    path = tmp_path_factory.mktemp("finished")
    run_job(*validated(2), path)
    assert steps(path / "checkpoints") == [18, 15]
    return path


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run"))


def lines_of(path):
    return (path / "metrics.jsonl").read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    "change,repaired",
    [
        (lambda lines: lines[:-1], True),  # the last evaluation
        (lambda lines: [*lines[:-1], lines[-1][:50]], True),
        (lambda lines: [*lines[:3], lines[3], *lines[3:]], True),
        (lambda lines: lines[:3] + lines[4:], False),  # an evaluation whose checkpoint is gone
        (lambda lines: lines[1:], False),
        (lambda lines: [line.replace('"train/loss": ', '"train/loss": 1') for line in lines], False),
        (lambda lines: [], False),
    ],
)
@pytest.mark.parametrize("epochs", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_changed_log_is_repaired_or_reported(finished, copy, capsys, change, repaired, epochs):
    """Also in a finished run, which is then not reported as "already finished"."""
    lines = lines_of(copy)
    (copy / "metrics.jsonl").write_text("".join(change(lines)))
    job, config = validated(epochs)
    if epochs == 2:
        assert not session.is_finished(job, str(copy), copy / "checkpoints")
        assert session.is_finished(job, str(finished), finished / "checkpoints")
    _, directory = run_job(job, config, copy)
    (note,) = capsys.readouterr().err.splitlines()
    assert ("it is repaired" in note) == repaired
    before = [json.loads(line) for line in lines]
    same = without_time(directory.history[: len(before)]) == without_time(before)
    assert same == repaired


def test_an_unchanged_log_is_not_mentioned(copy, capsys):
    run_job(*validated(3), copy)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("remove", ["checkpoints", "checkpoints/*"])
def test_a_run_that_has_lost_its_checkpoints_does_not_start_again(copy, remove):
    for path in copy.glob(remove):
        shutil.rmtree(path)
    before = lines_of(copy)
    with pytest.raises(OSError, match="has lost its checkpoints: bring them back, or name another") as error:
        run_job(*validated(3), copy)
    assert "\n" not in str(error.value) and lines_of(copy) == before


@pytest.mark.parametrize(
    "change", ["delete", *(pytest.param(name, marks=pytest.mark.slow) for name in ("028", "1e3", "28 "))]
)
def test_a_lost_latest_checkpoint_is_reported_by_every_reader(copy, capsys, change):
    """Deleted, or renamed to no step: no reader takes another one instead, and training repeats its steps."""
    latest = copy / "checkpoints" / "18"
    shutil.rmtree(latest) if change == "delete" else latest.rename(latest.parent / change)
    for which in ("", "best", "latest"):
        with pytest.raises(
            ValueError, match="the latest checkpoint, of step 18, is lost .*another checkpoint: 15"
        ) as error:
            vae_jax.load(str(copy), which)
        assert "\n" not in str(error.value)
    assert vae_jax.load(str(copy), 15).step == 15
    run_job(*validated(3), copy)
    lost, best = capsys.readouterr().err.splitlines()
    assert lost == "vae_jax: checkpoint 18 is lost: training repeats the steps since 15"
    assert "the best checkpoint, of step 9, is lost" in best  # 18 had become the best, so 9 was deleted
    assert vae_jax.load(str(copy), "latest").step == 27


def test_a_pipe_in_place_of_a_file_is_damage(copy):
    file = copy / "checkpoints" / "18" / "_CHECKPOINT_METADATA"
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(ValueError, match="checkpoint 18 is damaged: .*it is not a regular file"):
        vae_jax.load(str(copy))


@pytest.mark.parametrize("section,field,value", [("objective", "beta", 9.0), ("model", "latent_dim", 21)])
def test_a_changed_config_file_is_noticed(copy, section, field, value):
    file = copy / "config.json"
    changed = json.loads(file.read_text())
    changed[section][field] = value
    file.write_text(json.dumps(changed))
    given, (job, _) = session.read_config(str(copy)), validated(2)
    for use in (
        lambda: vae_jax.load(str(copy)),
        lambda: commands.evaluate(str(copy), given, "", "test"),
        lambda: commands.reconstruct(str(copy), given, "", "test", 2),
    ):
        with pytest.raises(ValueError, match=f"config.json in .*{section}.{field} is .* there, {value} here") as error:
            use()
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=f"holds another run .{section}.{field} is .* there, {value} here"):
        session.is_finished(job._replace(metadata=job.metadata | {"config": given}), str(copy), copy / "checkpoints")


@pytest.mark.slow
def test_loading_beside_a_training_that_keeps_one_checkpoint(tmp_path):
    """Whatever is deleted while it is read, the next latest is loaded."""
    job, config = small_job({"epochs": 6}, steps_per_call=1, save_every=1, keep=1)
    training = threading.Thread(target=run_job, args=(job, config, tmp_path))
    training.start()
    loaded = set()
    while training.is_alive():
        if steps(tmp_path / "checkpoints"):
            loaded.add(vae_jax.load(str(tmp_path)).step)
    training.join()
    assert len(loaded) > 2


def test_a_damaged_best_checkpoint_is_reported_by_every_reader(copy):
    best = commands.evaluate(str(copy), validated(2)[1], "best", "test")["step"]
    file = copy / "checkpoints" / str(best) / "variables" / "_METADATA"
    file.write_bytes(file.read_bytes()[:-1])
    for read in (
        lambda: vae_jax.load(str(copy)),
        lambda: commands.evaluate(str(copy), validated(2)[1], "", "test"),
        lambda: commands.sample(str(copy), validated(2)[1], "best", 3, 0),
    ):
        with pytest.raises(ValueError, match=f"checkpoint {best} is damaged: .*or choose another checkpoint: 15"):
            read()


def test_a_loaded_model_is_a_value(finished):
    vae = vae_jax.load(str(finished))
    again = pickle.loads(pickle.dumps(vae))
    np.testing.assert_array_equal(vae.sample(2), again.sample(2))
    assert vae != again and len({vae, again, vae}) == 2
    assert repr(vae).startswith(f"<VAE on digits: step {vae.step}, {vae_size(vae):,} parameters")


def vae_size(vae):
    return sum(np.size(leaf) for leaf in jax.tree.leaves(vae.variables["params"]))


START = """
import os, runpy, signal, sys
{}
sys.argv[0] = "vae_jax"
runpy.run_module("vae_jax.main", run_name="__main__", alter_sys=True)
"""
ENVIRONMENTS = {
    "stderr is closed": "os.close(2); sys.stderr = None",
    "stdout is closed": "os.close(1); sys.stdout = None",
    "nobody reads": "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1); os.dup2(writer, 2)",
    "stdout is full": "full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1)",
    "both are full": "full = os.open('/dev/full', os.O_WRONLY); os.dup2(full, 1); os.dup2(full, 2)",
    "no home": "import pwd; os.environ.pop('HOME'); pwd.getpwuid = {}.__getitem__",
    "no figures": "from vae_jax import figures; figures.training_curve = None",
}


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("stderr is closed", "no home") else pytest.param(name, marks=pytest.mark.slow)
        for name in ENVIRONMENTS
    ],
)
def test_a_hostile_environment_does_not_end_a_training(forks, tmp_path, name):
    start = START.format(ENVIRONMENTS[name])
    process = forks("-c", start, *FLAGS, f"--workdir={tmp_path}/run", drawn=name == "no figures")
    process.ends(0)
    assert steps(tmp_path / "run" / "checkpoints")[0] == 11
    assert (tmp_path / "run" / "summary.md").exists()
    if name == "no figures":
        assert "the figures of epoch 1 could not be made (TypeError" in process.stderr


def test_results_that_cannot_be_printed_are_an_error_but_a_closed_pipe_is_not(forks, copy):
    evaluate = "--mode=evaluate", f"--workdir={copy}"
    process = forks("-c", START.format(ENVIRONMENTS["stdout is full"]), *evaluate)
    assert "cannot print the results ([Errno 28] No space left on device)" in process.refuses()
    assert forks("-c", START.format(ENVIRONMENTS["nobody reads"]), *evaluate).ends(0) == ""


def test_output_drops_what_cannot_be_written(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", encoding="ascii") as pipe:
        output = Output(pipe)
        assert output.write("lost") == 4
        output.flush()
        assert isinstance(output.error, BrokenPipeError)
        output.write("lost too")
        output.flush()
        assert output.encoding == "ascii"


def test_a_checkpoint_of_another_run_is_noticed(copy, tmp_path):
    job, config = validated(2)
    run_job(
        job._replace(seeds=range(1, 2), metadata=job.metadata | {"config": config | {"seed": 1}}),
        config,
        tmp_path / "b",
    )
    shutil.rmtree(copy / "checkpoints" / "18")
    shutil.copytree(tmp_path / "b" / "checkpoints" / "18", copy / "checkpoints" / "18")
    with pytest.raises(ValueError, match="is not what checkpoint 18 was trained with .seed is 1 there, 0 here"):
        vae_jax.load(str(copy), "latest")
    (copy / "config.json").unlink()
    assert vae_jax.load(str(copy), 18).config["seed"] == 1  # nothing is left to compare with


OUT_OF_MEMORY = """
import jax
from vae_jax.run import session
def run(*arguments):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\\nmore")
session.run = run
"""


def test_out_of_memory_is_one_line(forks, tmp_path):
    process = forks("-c", START.format(OUT_OF_MEMORY), *FLAGS, f"--workdir={tmp_path}")
    assert "out of memory: try a smaller batch_size or model, with another --workdir" in process.refuses()


@pytest.mark.parametrize("name,kind", [("figures", "file"), ("metrics.jsonl", "folder")])
def test_a_file_in_place_of_a_folder_is_named(forks, copy, name, kind):
    path = copy / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    path.write_text("") if kind == "file" else path.mkdir()
    with pytest.raises(OSError, match=f"{copy}/{name}") as error:
        run_job(*validated(3), copy)
    assert error.value.strerror is not None or "but must be a folder" in str(error.value)


def test_a_hangup_saves(forks, tmp_path):
    process = forks("-m", "vae_jax.main", *FLAGS, "--config.epochs=500", f"--workdir={tmp_path}")
    process.wait_for(lambda: (tmp_path / "checkpoints").is_dir() and steps(tmp_path / "checkpoints"))
    process.send_signal(signal.SIGHUP)
    assert "stopped and saved at step" in process.refuses(128 + signal.SIGHUP)


@pytest.mark.parametrize(
    "flag,message",
    [
        ("--config.objective.beta=1e-320", "objective.beta is 1e-320, but must be 0 or at least 1.18e-38 in size"),
        ("--config.objective.beta=1e30", "at step 1: no update had been made, so try smaller numbers in the sections"),
        ("--workdir=run\udcff", "the work directory 'run\\udcff' is not UTF-8, which checkpoints need"),
        ("--workdir=http://x", "the work directory http://x is neither on this machine nor on gs://"),
    ],
)
def test_numbers_and_names_that_cannot_be_trained_with(forks, tmp_path, flag, message):
    process = forks("-m", "vae_jax.main", *FLAGS, f"--workdir={tmp_path}/run", flag)
    assert message in process.refuses()


@pytest.mark.slow
@pytest.mark.parametrize("name,value", [("JAX_ENABLE_X64", "1"), ("JAX_DISABLE_JIT", "1"), ("JAX_PLATFORMS", "tpu")])
def test_settings_of_jax_that_cannot_work_are_refused(tmp_path, name, value):
    process = fresh("-m", "vae_jax.main", *FLAGS, f"--workdir={tmp_path}/run", **{name: value})
    assert name in process.refuses() and not (tmp_path / "run").exists()


def test_other_random_numbers_are_reported(monkeypatch):
    before = environment(1)
    monkeypatch.setenv("NPROC", "1")
    changed = differences(
        before, before | {"random numbers": "threefry2x32, not partitionable", "CPU cores": "2 NPROC=1"}
    )
    assert "random numbers was threefry2x32, partitionable, is threefry2x32, not partitionable" in changed
    assert environment(1)["CPU cores"].endswith("NPROC=1")


@pytest.mark.parametrize("value", ["1", None])
def test_a_setting_of_jax_that_changes_numbers_is_recorded(monkeypatch, value):
    name = "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = environment(1)
    monkeypatch.setenv(name, value) if value else monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "/elsewhere")
    expected = f"JAX settings was unset, is {name}=1" if value else ""
    assert differences(before, environment(1)) == expected


@pytest.mark.parametrize(
    "content,message",
    [
        (None, "has no config.json of a run"),
        ("[" * 100_000, "has no config.json of a run"),
        ('"saved": null', "config.json is damaged"),
        ('"saved": -1', "config.json is damaged"),
        ('"saved": 33.5', "config.json is damaged"),
        ('"format": 2', "has format 2, but this version of vae_jax reads 3"),
        ('"format": true', "config.json is damaged"),
        ('"epochs": 2.5', "config.json is damaged"),
    ],
)
def test_a_checkpoint_is_the_latest_only_if_config_json_says_so(copy, content, message):
    """Without config.json an older checkpoint would silently replace a lost one; a given step loads without it."""
    file = copy / "config.json"
    found = steps(copy / "checkpoints")
    shutil.rmtree(copy / "checkpoints" / str(found[0]))
    if content is None:
        file.unlink()
    elif content.startswith("["):
        file.write_text(content)
    else:
        name = content.partition(":")[0].strip('"')
        file.write_text(re.sub(rf'"{name}": [\d.]+', content, file.read_text(), count=1))
    with pytest.raises(ValueError, match=f"{message}.*choose a step"):
        vae_jax.load(str(copy), "latest")
    assert vae_jax.load(str(copy), found[1]).step == found[1]


@pytest.mark.parametrize("name", ["lock", "metrics.jsonl", "config.json"])
def test_a_pipe_or_a_device_in_the_run_directory_is_not_read(copy, name):
    """A pipe would be waited for, and a device would fill the memory."""
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        path = copy / name
        path.unlink(missing_ok=True)
        make(path)
        with pytest.raises(OSError, match="is not a regular file|has no config.json of a run"):
            run_job(*validated(3), copy)
        if name == "config.json":
            with pytest.raises(ValueError, match="has no config.json of a run"):
                vae_jax.load(str(copy))


def test_a_device_in_place_of_the_list_of_digests_is_damage(copy):
    step = steps(copy / "checkpoints")[0]
    file = copy / "checkpoints" / str(step) / "sha256.json"
    file.unlink()
    file.symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=f"checkpoint {step} is damaged: .*it is not a regular file"):
        vae_jax.load(str(copy))


def test_the_last_of_several_values_of_a_field_counts():
    argv = ["main", "--config=a.py", "--config.model.hidden=4,4", "--config.seed=1", "--config.model.hidden=8,8"]
    assert main.drop_repeated(argv) == ["main", "--config=a.py", "--config.seed=1", "--config.model.hidden=8,8"]


@pytest.mark.parametrize("name", ["ki$ng^{", "数字", "a\udcff", "$x_1$"])
def test_a_title_is_text(tmp_path, name):
    from vae_jax.families import FAMILIES
    from vae_jax.run.config import make_title
    from vae_jax.run.files import save_figure

    title = make_title(FAMILIES["vae"], f"/data/{name}")
    figure = figures.image_grid(np.zeros((1, 4, 4, 1)), title)
    save_figure(figure, tmp_path / "figure.png")
    assert figure.get_suptitle().replace(r"\$", "$") == title


def test_a_damaged_compilation_cache_is_noticed(tmp_path):
    """With zstandard installed JAX would keep programs without a checksum."""
    pytest.importorskip("zstandard")
    code = f"""
import jax
jax.config.update("jax_compilation_cache_dir", {str(tmp_path)!r})
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
from vae_jax.run.session import enable_compilation_cache
enable_compilation_cache()
print(jax.jit(lambda x: x @ x.T + 1)(jax.numpy.ones((3, 3)))[0, 0])
"""

    def start():
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (0, "4.0\n"), result.stderr

    start()
    programs = [path for path in tmp_path.iterdir() if path.name.endswith("-cache")]
    assert programs and all(path.read_bytes()[:1] == b"x" for path in programs)  # zlib's first byte
    for path in programs:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(bytes(content))
    start()
