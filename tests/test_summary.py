"""What a summary says beside the numbers: layers, units, and the version of the code."""

import subprocess

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from vae_jax.families import semisupervised, vae
from vae_jax.nn.layer_table import BATCH, layer_table, output_shapes
from vae_jax.run.environment import code_version
from vae_jax.run.summary import About, rows, summarize

SHAPE = (28, 28, 1)
IMAGES = jax.ShapeDtypeStruct((BATCH, *SHAPE), jnp.float32)
POST = [  # Tables 1 and 2 of the post
    ["encoder conv1", "3x3x1x32", "14x14x32", "320"],
    ["encoder conv2", "3x3x32x64", "7x7x64", "18,496"],
    ["encoder fc", "3136x40", "40", "125,480"],
    ["decoder tconv1", "7x7x20x64", "7x7x64", "62,784"],
    ["decoder tconv2", "3x3x64x64", "14x14x64", "36,928"],
    ["decoder tconv3", "3x3x64x32", "28x28x32", "18,464"],
    ["decoder tconv4", "3x3x32x1", "28x28x1", "289"],
    ["all", "", "", "262,761"],
]


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def test_the_layers_are_those_of_the_post():
    """Two draws of z: the samples and the batch are left out of the outputs."""
    model = vae.make(SHAPE)
    variables = shapes_of(model)

    def reconstruct(variables, image):
        mean, _ = model.encode(variables, image)
        return model.decode_raw(variables, jnp.stack([mean, mean]))

    table = layer_table(variables["params"], output_shapes(reconstruct, variables, IMAGES))
    assert table == [["layer", "kernel", "output", "parameters"], *POST]
    assert layer_table(variables["params"]) == [["layer", "kernel", "parameters"], *([a, b, d] for a, b, _, d in POST)]


def test_a_layer_is_found_wherever_its_network_lies_in_the_parameters():
    """M2's classifier is applied from its own root, and its first layer has the name of the encoder's."""
    model = semisupervised.make(SHAPE, 10, network="mlp")
    variables = shapes_of(model)
    table = layer_table(variables["params"], output_shapes(model.probabilities, variables, IMAGES))
    found = {name: output for name, _, output, _ in table}
    assert found["classifier fc1"] == "200" and found["classifier fc"] == "10"
    assert found["autoencoder decoder fc"] == ""  # it was not called


def test_layers_of_one_name_are_told_apart_by_their_parameters():
    """The axis before the batch is one of samples."""

    class Net(nn.Module):
        width: int

        @nn.compact
        def __call__(self, x):
            return nn.Dense(self.width, name="fc")(x)

    nets = {"a": Net(3), "b": Net(5)}
    x = jax.ShapeDtypeStruct((4, BATCH, 2), jnp.float32)
    params = {name: jax.eval_shape(net.init, jax.random.key(0), x)["params"] for name, net in nets.items()}

    def apply(params, x):
        return [net.apply({"params": params[name]}, x) for name, net in nets.items()]

    assert layer_table(params, output_shapes(apply, params, x))[1:] == [
        ["a fc", "2x3", "3", "9"],
        ["b fc", "2x5", "5", "15"],
        ["all", "", "", "24"],
    ]


def test_parameters_without_a_layer_are_counted():
    params = {"prior": {"mean": jnp.zeros((4, 2))}, "scale": jnp.zeros(())}
    assert layer_table(params) == [
        ["layer", "kernel", "parameters"],
        ["prior", "", "8"],
        ["scale", "", "1"],
        ["all", "", "9"],
    ]


def test_a_number_has_its_interval_and_its_unit():
    numbers = {"test/loss": 18.0, "test/loss/interval": 0.25, "at the best step: validation/kl": 7.0, "steps": 3}
    assert rows(numbers | {"test/confusion": [[1, 2]], "test/scale": 0.5}, vae.METRICS) == [
        ["test/loss", "18 ± 0.25 (95 %)", "nats ↓"],
        ["at the best step: validation/kl", "7", "nats ↓"],
        ["steps", "3", ""],
        ["test/scale", "0.5", "pixels in [0, 1]"],
    ]


def test_the_page_escapes_names_and_gives_the_facts():
    about = About(vae.METRICS, {"train": 1437, "test": 360}, [["layer", "parameters"], ["all", "1,000"]])
    text = summarize(
        "VAE on a|b", {"devices": 1, "p(x | z)": 1.0}, about, "python", "vae_jax 1", 61.0, ["figures/a.png"]
    )
    for part in (
        r"| p(x \| z) | 1 |  |",
        "- images: 1,437 train, 360 test",
        "- parameters: 1,000",
        "- code: vae_jax 1",
        "- time: 1 min 1 s",
        "![a](figures/a.png)",
    ):
        assert part in text


@pytest.fixture
def checkout(tmp_path):
    """A repository with a package in it, and the commit."""
    package = tmp_path / "project" / "package"
    package.mkdir(parents=True)
    (package / "code.py").write_text("1\n")

    def git(*command):
        given = ("-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false")
        ran = subprocess.run(["git", "-C", tmp_path, *given, *command], check=True, capture_output=True, text=True)
        return ran.stdout.strip()

    git("init", "-q", "project")
    git("-C", "project", "add", ".")
    git("-C", "project", "commit", "-q", "-m", "first")
    return package, git("-C", "project", "rev-parse", "HEAD")


def test_the_commit_is_named_and_whether_files_differ_from_it(checkout, monkeypatch):
    package, commit = checkout
    version = code_version.__wrapped__
    assert version(package).endswith(f", commit {commit[:12]}")
    (package.parent / "notes.md").write_text("not code\n")
    assert version(package).endswith(f", commit {commit[:12]}")
    (package / "new.py").write_text("2\n")
    assert version(package).endswith(f", commit {commit[:12]}, with changes in package/")
    installed = package / "site-packages" / "package"  # in somebody else's repository
    installed.mkdir(parents=True)
    assert "commit" not in version(installed)
    monkeypatch.setenv("PATH", "")
    assert version(package).startswith("vae_jax ") and "commit" not in version(package)
