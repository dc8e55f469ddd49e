"""A trained model as a folder: the same model comes back, or one line says why not; the bundled models; other runtimes."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load
from small_run import run_job, small_job

import vae_jax
from configs import classifier, vae
from vae_jax import commands, export, weights
from vae_jax.export import for_jax
from vae_jax.families import FAMILIES
from vae_jax.pretrained import Pretrained
from vae_jax.pretrained.loading import stored_config
from vae_jax.run import session
from vae_jax.run.config import changes, defaults

FILES = {"README.md", "config.json", "model.safetensors", "sha256.json"}


@pytest.fixture(scope="module")
def run(small, tmp_path_factory):
    """A finished run, its last row, and the folder to which it is exported."""
    directory = small[1]
    path = shutil.copytree(directory.path, tmp_path_factory.mktemp("run") / "run")
    export.export(str(path), str(path.parent / "exported"))
    return path, directory.history[-1], path.parent / "exported"


def read_all(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_an_exported_folder_loads_as_the_run(run):
    path, row, folder = run
    original, exported = vae_jax.load(path), vae_jax.load(str(folder))
    jax.tree.map(np.testing.assert_array_equal, original.variables, exported.variables)
    assert jax.tree.structure(original.variables) == jax.tree.structure(exported.variables)
    assert exported.step == 10 and exported.title == "VAE on digits" and exported.data == original.data
    assert exported.metadata["metrics"] == {name: value for name, value in row.items() if name.startswith("test/")}
    np.testing.assert_array_equal(original.sample(3), exported.sample(3))
    for name in ("latest", "best", 10, "10"):
        assert vae_jax.load(str(folder), name).step == 10
    with pytest.raises(ValueError, match="there is no checkpoint '5' in .*: it holds only step 10"):
        vae_jax.load(str(folder), "5")
    with pytest.raises(ValueError, match="seed 3 was not trained in"):
        vae_jax.load(str(folder), seed=3)


def test_scalars_keep_their_shape(run):
    """As the learned scale of a likelihood."""
    found = load(weights.save({"likelihood": {"total": jnp.ones(()), "weight": jnp.ones((1,))}}))
    assert {name: leaf.shape for name, leaf in found.items()} == {"likelihood/total": (), "likelihood/weight": (1,)}


def test_the_layout_is_that_of_a_model_hub(run):
    files = read_all(run[2])
    assert files.keys() == FILES
    _, front, card = files["README.md"].decode().split("---\n", 2)
    facts = {name: json.loads(value) for name, _, value in (line.partition(": ") for line in front.splitlines())}
    assert facts["library_name"] == "vae_jax" and facts["datasets"] == ["digits"] and "vae" in facts["tags"]
    assert "# VAE on digits\n" in card and "| test/loss" in card and "vae_jax.load(" in card
    listed = json.loads(files["sha256.json"])
    assert listed == {name: hashlib.sha256(files[name]).hexdigest() for name in ("config.json", "model.safetensors")}


def test_no_path_of_this_machine_is_exported(run, tmp_path):
    path = shutil.copytree(run[0], tmp_path / "run")
    pretrained = vae_jax.load(str(path))
    secret = {"manual_dir": "/home/me/files", "name": "/home/me/photos"}
    config = pretrained.config | {"data": pretrained.config["data"] | secret}
    pretrained.metadata["config"] = config
    found = export.describe(pretrained, str(path))
    assert found["config"]["data"]["name"] == "./photos" and "/home/me" not in json.dumps(found)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "sha256.json"])
def test_a_changed_byte_is_refused(run, tmp_path, name, tally):
    folder = shutil.copytree(run[2], tmp_path / "copy")
    content = (folder / name).read_bytes()
    places = sorted({0, 1, 8, len(content) // 3, len(content) // 2, len(content) - 2})
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1
        (folder / name).write_bytes(changed)
        with (
            tally("damaged export"),
            pytest.raises(ValueError, match="is damaged or changed: export or copy it") as error,
        ):
            vae_jax.load(str(folder))
        assert "\n" not in str(error.value)
    (folder / name).unlink()
    with pytest.raises(ValueError, match=f"{name} is missing: export or copy it again"):
        vae_jax.load(str(folder))


def sign(folder):
    """Make sha256.json say what the files are."""
    listed = {
        name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("config.json", "model.safetensors")
    }
    (folder / "sha256.json").write_text(json.dumps(listed))


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda config: config | {"format": 2}, "config.json is of format 2, but this version of vae_jax reads 1"),
        (lambda config: [], "config.json is of format None"),
        (lambda config: config | {"step": "10"}, "config.json does not describe a model"),
        (lambda config: config | {"config": {"model": {}}}, "config.json does not describe a model"),
        (
            lambda config: config | {"config": config["config"] | {"model": {"name": "none"}}},
            "unknown model.name 'none'",
        ),
        (
            lambda config: config | {"image_shape": [32, 28, 1]},
            "the weights in .* are not those of the model in its config",
        ),
    ],
)
def test_what_is_signed_must_still_be_a_model(run, tmp_path, change, message):
    folder = shutil.copytree(run[2], tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(change(config)))
    sign(folder)
    with pytest.raises(ValueError, match=message) as error:
        vae_jax.load(str(folder))
    assert "\n" not in str(error.value)


def test_a_list_that_leads_out_of_the_folder_is_refused(run, tmp_path):
    folder = shutil.copytree(run[2], tmp_path / "copy")
    listed = json.loads((folder / "sha256.json").read_text()) | {"../run/config.json": "0"}
    (folder / "sha256.json").write_text(json.dumps(listed))
    with pytest.raises(ValueError, match="is damaged or changed"):
        vae_jax.load(str(folder))


def test_the_card_may_be_edited_and_hub_files_added(run, tmp_path):
    folder = shutil.copytree(run[2], tmp_path / "copy")
    (folder / "README.md").write_text("mine")
    (folder / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert vae_jax.load(str(folder)).step == 10
    (folder / ".gitattributes").unlink()
    export.export(str(run[0]), str(folder))
    assert (folder / "README.md").read_text() == "mine"


def test_a_folder_that_holds_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").write_text("mine")
    other = shutil.copytree(run[2], tmp_path / "other")
    (other / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for name in ("file", "folder", "other"):
        with pytest.raises(
            FileExistsError, match=f"{name} holds something other than this export: name another"
        ) as error:
            export.export(str(run[0]), str(tmp_path / name))
        assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    (tmp_path / "empty").mkdir()
    assert {path.name for path in export.export(str(run[0]), str(tmp_path / "empty"))} == FILES
    assert export.export(str(run[0]), str(tmp_path / "empty")) == export.export(str(run[0]), str(tmp_path / "empty"))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_unknown_format_and_a_place_that_cannot_be_written(run, tmp_path):
    with pytest.raises(ValueError, match="there is no format 'tf': give one of jax, onnx"):
        export.export(str(run[0]), str(tmp_path / "new"), formats=["tf"])
    with pytest.raises(ValueError, match="gs://b/x is not on this machine: export to a folder here, and copy that"):
        export.export(str(run[0]), "gs://b/x")
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="cannot write the export .*: name another folder with --output") as error:
        export.export(str(run[0]), str(tmp_path / "file" / "new"))
    assert "\n" not in str(error.value)


def test_an_export_of_an_export_is_the_same(run, tmp_path):
    export.export(str(run[2]), str(tmp_path / "again"))
    assert read_all(tmp_path / "again") == read_all(run[2])


@pytest.mark.slow
def test_one_of_several_seeds_is_exported(tmp_path):
    run_job(*small_job({"seeds": 2, "seed": 5}), tmp_path / "run")
    export.export(str(tmp_path / "run"), str(tmp_path / "six"), seed=6)
    exported = vae_jax.load(str(tmp_path / "six"))
    expected = vae_jax.load(str(tmp_path / "run"), seed=6)
    jax.tree.map(np.testing.assert_array_equal, exported.variables, expected.variables)
    assert exported.config["seed"] == 6 and exported.metadata["metrics"] == {}


def test_modes_take_an_exported_folder(run, tmp_path):
    path, row, _ = run
    folder = shutil.copytree(run[2], tmp_path / "exported")
    config = stored_config(str(folder))
    assert config == stored_config(str(path))
    assert commands.evaluate(str(folder), config, "", "test")["test/loss"] == row["test/loss"]
    picture, _ = commands.sample(str(folder), config, "", 3, 0)
    assert picture.parent == folder / "generated"
    assert commands.reconstruct(str(folder), config, "", "test", 3)[0].exists()
    paths = commands.export(str(path), "", None, None)
    assert {path.parent for path in paths} == {path / "generated" / "export-step10"}


def test_fields_younger_than_an_export_have_their_defaults(run, tmp_path):
    folder = shutil.copytree(run[2], tmp_path / "copy")
    metadata = json.loads((folder / "config.json").read_text())
    del metadata["config"]["data"]["labelled"], metadata["config"]["model"]["components"], metadata["config"]["seeds"]
    metadata["config"]["seeds"] = 1
    (folder / "config.json").write_text(json.dumps(metadata))
    sign(folder)
    config = vae_jax.load(str(folder)).config
    assert config["data"]["labelled"] == -1 and config["model"]["components"] == 100
    session.check_same_config(str(folder), stored_config(str(folder)), vae_jax.load(str(run[0])).config)


# The box.


def test_the_box_is_as_it_was_made():
    for name, digest in weights.SHA256.items():
        assert hashlib.sha256((weights.FOLDER / name / "model.safetensors").read_bytes()).hexdigest() == digest
        assert read_all(weights.FOLDER / name).keys() == FILES
        assert vae_jax.load(name).config["data"]["name"] == "mnist"
        card = (weights.FOLDER / name / "README.md").read_text()
        assert f"--mode=export --workdir=runs/{name} --output={name}" in card
    _, variables = weights.pinned_classifier()
    jax.tree.map(np.testing.assert_array_equal, variables, vae_jax.load("mnist-classifier").variables)


def test_digits_of_the_box_are_read_by_its_classifier():
    """Samples from the prior are of every class, and the classifier is sure of most."""
    made = vae_jax.load("mnist-vae").sample(500, seed=0)
    label, probability = vae_jax.load("mnist-classifier").predict(made)
    assert len(np.unique(label)) == 10 and probability.mean() > 0.75


@pytest.mark.slow
@pytest.mark.parametrize("name", weights.SHA256)
def test_the_models_in_the_box_have_their_test_losses(name, mnist_dir):
    """What their cards say, computed from the weights: 18.49 nats, the post's 18.5; 99.26 % and 0.0255 nats."""
    folder = weights.resolve(name)
    config = stored_config(folder)
    config = config | {"data": config["data"] | {"manual_dir": mnist_dir}}
    found = commands.evaluate(folder, config, "", "test")
    stated = weights.read(weights.FOLDER / name)[0]["metrics"]
    assert found["test/loss"] == pytest.approx(stated["test/loss"], rel=1e-4)
    known = {"mnist-vae": 18.4858, "mnist-classifier": 0.02549}
    assert found["test/loss"] == pytest.approx(known[name], rel=1e-3)
    if name == "mnist-classifier":
        assert found["test/accuracy"] == pytest.approx(0.9926, abs=2e-4)


@pytest.mark.parametrize("name,preset", [("mnist-vae", vae), ("mnist-classifier", classifier)])
def test_the_presets_fit_the_models_in_the_box(name, preset):
    """So --config=vae, which a mode needs for data.manual_dir, is not another config."""
    assert changes(stored_config(weights.resolve(name)), preset.get_config().to_dict()) == []


def test_a_folder_of_that_name_wins_and_outputs_stay_out_of_the_package(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    before = {path.name for path in (weights.FOLDER / "mnist-vae").iterdir()}
    folder = weights.resolve("mnist-vae")
    picture, _ = commands.sample(folder, {}, "", 3, 0)
    assert picture.exists() and str(picture) == "generated/mnist-vae/sample-step5850-count3-seed0.png"
    assert {path.name for path in (weights.FOLDER / "mnist-vae").iterdir()} == before
    assert capsys.readouterr().err == ""
    shutil.copytree(run[2], tmp_path / "mnist-vae")
    assert vae_jax.load("mnist-vae").step == 10
    assert capsys.readouterr().err == "vae_jax: mnist-vae is the folder here, not the bundled model\n"
    picture, _ = commands.sample(weights.resolve("mnist-vae"), {}, "", 3, 0)
    assert picture.parent.resolve() == tmp_path / "mnist-vae" / "generated"


# Networks as data, and programs for other runtimes.


def pretrained(family, shape, classes=3, **fields):
    """An untrained model all of whose weights are random, biases and statistics too."""
    config = defaults(family)
    config["model"] |= fields
    config["data"] |= {"name": "digits"}
    metadata = {"config": config, "step": 0, "data": {}, "image_shape": list(shape), "num_classes": classes}
    empty = Pretrained(metadata, {})
    variables = jax.jit(empty.model.init)(jax.random.key(0))
    rng = np.random.default_rng(0)
    varied = jax.tree.map(lambda leaf: jnp.asarray(leaf + rng.uniform(0.0, 0.3, leaf.shape), jnp.float32), variables)
    for name, norm in varied["params"].items():
        if name.startswith("norm"):  # of the classifier: some channels are turned round
            norm["scale"] = norm["scale"] * jnp.where(jnp.arange(len(norm["scale"])) % 2, 1.0, -1.0)
    return Pretrained(metadata, varied)


NETWORKS = {
    "the post's": ("vae", (12, 20, 3), {"encoder_features": (5, 3), "decoder_features": (3, 5)}),
    "odd sizes, one layer": ("vae", (14, 10, 1), {"encoder_features": (4,), "decoder_features": (4,)}),
    "three layers": ("vae", (16, 24, 1), {"encoder_features": (4, 5, 6), "decoder_features": (6, 5, 4)}),
    "pooling": ("vae", (12, 20, 2), {"pooling": True, "encoder_features": (4, 3), "decoder_features": (3, 4)}),
    "dense": ("vae", (5, 7, 2), {"network": "mlp", "hidden": (9, 6), "likelihood": "bernoulli"}),
    "in bfloat16": ("vae", (8, 8, 1), {"precision": "bfloat16", "encoder_features": (4,), "decoder_features": (4,)}),
    "classifier": ("classifier", (13, 15, 2), {"features": (4, 3, 5)}),
}


def need(*modules):
    return [pytest.importorskip(module, reason=f"{module} is not installed") for module in modules]


@pytest.mark.parametrize("name", NETWORKS)
def test_onnx_programs(name):
    """`onnx_programs` itself refuses a program that does not give what the model gives."""
    _, runtime = need("onnx", "onnxruntime")
    family, shape, fields = NETWORKS[name]
    trained = pretrained(family, shape, **fields)
    contents = export.FORMATS["onnx"](trained)
    assert contents.keys() == {f"{part}.onnx" for part in for_jax.programs_of(trained)}
    if family == "vae":
        z = np.random.default_rng(0).normal(size=(7, 20)).astype(np.float32)
        (image,) = runtime.InferenceSession(contents["decoder.onnx"]).run(["image"], {"z": z})
        np.testing.assert_allclose(image, trained.decode(z), atol=1e-2 if "bfloat16" in name else 1e-5)


def test_an_onnx_program_that_differs_is_refused(monkeypatch):
    need("onnx", "onnxruntime")
    family, shape, fields = NETWORKS["the post's"]
    trained = pretrained(family, shape, **fields)
    layers = trained.model.layers(trained.variables)
    layers["decoder"][-1] = layers["decoder"][-1]._replace(kind="tanh")
    changed = trained.with_prior(trained.model.prior)
    vars(changed)["model"] = trained.model._replace(layers=lambda variables: layers)
    monkeypatch.setattr("vae_jax.export.for_onnx.in_float32", lambda pretrained: pretrained)
    with pytest.raises(ValueError, match="the outputs of decoder.onnx differ from the model's"):
        export.FORMATS["onnx"](changed)


def test_models_without_layers_are_refused():
    need("onnx", "onnxruntime")
    for trained in (
        pretrained("conditional", (8, 8, 1)),
        pretrained("vae", (8, 8, 1), likelihood="continuous_bernoulli"),
    ):
        with pytest.raises(ValueError, match="the format onnx needs a model's layers, which this one does not give"):
            export.FORMATS["onnx"](trained)


@pytest.mark.parametrize(
    "package,format,packages",
    [
        ("onnx", "onnx", "onnx onnxruntime"),
        ("onnxruntime", "onnx", "onnx onnxruntime"),
        ("flatbuffers", "jax", "flatbuffers"),
    ],
)
def test_a_missing_package_is_named(package, format, packages, monkeypatch):
    if package == "onnxruntime":
        need("onnx")
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=f"the format {format} needs {package}: pip install {packages}$"):
        export.FORMATS[format](pretrained("vae", (8, 8, 1), encoder_features=(4,), decoder_features=(4,)))


JAX_PROGRAMS = {
    "vae": ((8, 12, 1), {"encoder_features": (4,), "decoder_features": (4,)}),
    "classifier": ((9, 12, 1), {"features": (4, 4)}),
    "conditional": ((8, 12, 1), {"encoder_features": (4,), "decoder_features": (4,), "prior": "learned"}),
    "sparse_labels": ((8, 12, 1), {"encoder_features": (4,), "decoder_features": (4,)}),
    "semisupervised": ((8, 12, 1), {"network": "mlp", "hidden": (4,)}),
    "stacked": ((8, 12, 1), {"network": "mlp", "hidden": (4,), "code_hidden": (4,)}),
    "vaegan": ((8, 12, 1), {"encoder_features": (4,), "decoder_features": (4,), "discriminator_features": (4, 4)}),
}


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=() if name == "vae" else pytest.mark.slow) for name in FAMILIES]
)
def test_jax_programs(family):
    """For any batch, on all platforms, bit for bit what the model gives on this one."""
    need("flatbuffers")
    shape, fields = JAX_PROGRAMS[family]
    trained = pretrained(family, shape, **fields)
    contents = export.FORMATS["jax"](trained)
    assert contents
    for name, program in for_jax.programs_of(trained).items():
        exported = jax.export.deserialize(bytearray(contents[f"{name}.jaxexport"]))
        assert exported.platforms == ("cpu", "cuda", "tpu")
        assert str(Path(vae_jax.__file__).parent).encode() not in contents[f"{name}.jaxexport"]
        for count in for_jax.BATCHES:  # compiled already
            arguments = program.examples(count)
            jax.tree.map(np.testing.assert_array_equal, exported.call(*arguments), jax.jit(program.call)(*arguments))


def test_a_completing_model_as_a_program():
    need("flatbuffers")
    fields = {"encoder_features": (4,), "decoder_features": (4,), "condition": "quadrant1"}
    contents = export.FORMATS["jax"](pretrained("conditional", (8, 12, 1), **fields))
    exported = jax.export.deserialize(bytearray(contents["decoder.jaxexport"]))
    visible = np.random.default_rng(0).random((2, 8, 12, 1), np.float32)
    visible[:, :4] = visible[:, :, 6:] = 0
    image = exported.call(np.zeros((2, 20), np.float32), visible)
    np.testing.assert_array_equal(image[:, 4:, :6], visible[:, 4:, :6])


def test_the_whole_export_by_the_command_line(run, tmp_path, forks):
    need("flatbuffers", "onnx", "onnxruntime")
    process = forks(
        "-m", "vae_jax", "--mode=export", f"--workdir={run[0]}", "--output=all", "--formats=jax,onnx", cwd=tmp_path
    )
    assert process.ends() == ""
    programs = {f"{part}.{kind}" for part in ("encoder", "decoder") for kind in ("jaxexport", "onnx")}
    assert (
        read_all(tmp_path / "all").keys() == FILES | programs == {path.split("/")[1] for path in process.stdout.split()}
    )
    assert vae_jax.load(str(tmp_path / "all")).step == 10
    (tmp_path / "all" / "encoder.onnx").write_bytes(b"changed")
    with pytest.raises(ValueError, match="encoder.onnx is damaged or changed"):
        vae_jax.load(str(tmp_path / "all"))
