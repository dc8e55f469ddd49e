"""The configs that ship with the package: found by name in any folder, in a clone and in a wheel."""

import configparser
import shutil
import subprocess
import sys

import pytest
from program import ROOT, fresh

from vae_jax.families import FAMILIES
from vae_jax.run import presets


def test_names_are_expanded(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    vae = str(ROOT / "configs" / "vae.py")
    for given, expected in [
        (["--config=vae"], [f"--config={vae}"]),
        (["-config=vae:digits", "--config.seed=3"], [f"-config={vae}:digits", "--config.seed=3"]),
        (["--config", "vae:"], ["--config", f"{vae}:"]),
        (["--mode=vae", "vae"], ["--mode=vae", "vae"]),
        *(([f"--config={other}"],) * 2 for other in ("configs/vae.py:digits", "vae.py", "", ":x", "./vae", "a/b")),
    ]:
        assert presets.expand(given) == expected
    (tmp_path / "vae").touch()  # a file of that name is the config that is meant
    assert presets.expand(["--config=vae:x"]) == ["--config=vae:x"]


def test_an_unknown_name_is_one_line(forks, tmp_path):
    stderr = forks("-m", "vae_jax", "--config=vea:digits", cwd=tmp_path).refuses()
    assert stderr == "vae_jax: there is no config vea: give a file, or a preset; did you mean vae?\n"


def test_there_is_a_preset_for_each_family():
    assert {*presets.names()} == {*FAMILIES}


@pytest.mark.slow
def test_a_wheel_holds_presets_and_models(tmp_path):
    """Built and installed elsewhere, it makes pictures of the bundled model, and finds presets, also one that needs
    another.
    """
    source, installed = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "tests", "docs", "experiments", "runs", "build"))
    pip = [sys.executable, "-m", "pip", "--quiet", "install", "--no-deps"]
    built = subprocess.run([*pip, f"--target={installed}", str(source)], capture_output=True, text=True, check=False)
    if built.returncode and "setuptools" in built.stderr:
        pytest.skip("pip cannot get setuptools, which builds the wheel")
    assert built.returncode == 0, built.stderr
    for path in (ROOT / "configs").glob("*.py"):
        assert (installed / "vae_jax" / "presets" / path.name).read_bytes() == path.read_bytes()
    for path in (ROOT / "vae_jax").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert (installed / path.relative_to(ROOT)).read_bytes() == path.read_bytes(), path
    assert not (installed / "configs").exists()
    elsewhere = {"cwd": tmp_path, "PYTHONPATH": str(installed)}
    assert fresh("-m", "vae_jax", "--config=conditional:smoke", "--help", **elsewhere).ends() == ""
    sampled = fresh("-m", "vae_jax", "--mode=sample", "--workdir=mnist-vae", **elsewhere)
    assert sampled.ends() == "" and (tmp_path / sampled.stdout.split()[0]).exists()


def test_packages_are_listed():
    """setup.cfg lists the packages, since it maps the folder of the presets, which lies outside."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "vae_jax").rglob("__init__.py")}
    assert listed == found | {"vae_jax.presets"}
