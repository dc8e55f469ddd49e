"""Configs: every variant builds, names just the fields there are; slips are told with the nearest name."""

import copy
import functools
import inspect
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import classifier, vae
from vae_jax import data, objectives, optimizers, steps
from vae_jax.batch import Dataset, Split, make_batch
from vae_jax.nn import networks
from vae_jax.run import loop, session
from vae_jax.run.config import changes, fields, flatten


@pytest.fixture
def config():
    return vae.get_config("smoke").to_dict()


SIGNATURES = {
    "data": [data.load],
    "model": networks.MODELS,
    "objective": objectives.OBJECTIVES,
    "optimizer": optimizers.OPTIMIZERS,
    "run": [loop.RunOptions],
}
CONFIGS = {"vae": vae, "classifier": classifier}
VARIANTS = [(name, v) for name, module in CONFIGS.items() for v in module.VARIANTS]


def fields_and_defaults(name, section):
    """A section of a config file, and the defaults of the function that it sets."""
    found = dict(CONFIGS[name].get_config()[section])
    functions = SIGNATURES[section]
    if isinstance(functions, dict):
        functions = [functions[found.pop("name")]]
    if section == "optimizer":
        functions.append(optimizers.averaging)
    defaults = {
        name: parameter.default
        for function in functions
        for name, parameter in fields(function).items()
    }
    return found, defaults


def test_every_field_is_described():
    described = dict(session.describe())
    configs = [module.get_config().to_dict() for module in CONFIGS.values()]
    assert set(described) == {name for config in configs for name in flatten(config)}
    assert all(described.values()), described
    assert described["model.latent_dim"] == "size of z."


@pytest.mark.parametrize("section", SIGNATURES)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_and_the_signature_name_the_same_fields_and_defaults(name, section):
    fields, defaults = fields_and_defaults(name, section)
    # A recipe of its own is not the default.
    if name == "classifier" and section in ("optimizer", "run"):
        assert set(fields) == set(defaults)
    else:
        assert fields == defaults


@pytest.mark.parametrize("name", CONFIGS)
def test_the_file_names_the_top_level_fields(name):
    config = CONFIGS[name].get_config()
    assert set(config) == set(inspect.signature(session.make_job).parameters)


@pytest.mark.parametrize("name,variant", VARIANTS)
def test_every_variant_builds_and_traces_its_step(name, variant):
    """On the bundled digits instead of MNIST, whose images have the same shape; the default also takes two steps."""
    config = CONFIGS[name].get_config(variant).to_dict()
    config["data"]["name"] = "digits"
    config["batch_size"] = 8
    job = session.build(config)
    image, label = (array[:8] for array in job.dataset.splits["train"])
    batch = make_batch(jnp.asarray(image), label, jnp.ones(8), jnp.arange(8))

    def initial():
        root = jax.random.key(job.seed)
        return steps.init_state(job.init(root), job.optimizer, root)

    step = steps.make_train_step(job.objective, job.optimizer)
    before = jax.eval_shape(initial)
    after, metrics = jax.eval_shape(step, before, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert metrics["loss"].total.shape == ()
    if variant == "default":
        state, step = jax.jit(initial)(), jax.jit(step)
        for _ in range(2):
            state, metrics = step(state, batch)
        assert state.step == 2 and np.isfinite(metrics["loss"].mean)


def test_only_matlab_does_not_shuffle():
    kept = {name: vae.get_config(name).data.shuffle for name in vae.VARIANTS}
    assert [name for name, shuffle in kept.items() if not shuffle] == ["matlab"]


def test_the_schedule_spans_the_training(config):
    """110 steps: 5 epochs of 22; a cosine has come down to zero after them."""
    config |= {"epochs": 5, "batch_size": 64}
    config["optimizer"] |= {"schedule": "cosine", "learning_rate": 0.1}
    optimizer = session.build(config).optimizer
    state = optimizer.init(jnp.zeros(()))
    rates = []
    for _ in range(111):
        update, state = optimizer.update(jnp.ones(()), state)
        rates.append(-float(update))
    assert rates[0] == pytest.approx(0.1, rel=1e-3)
    assert 0 < rates[109] < 1e-4 and rates[110] == 0


def test_the_yardsticks_are_those_of_the_training_images(config):
    config["objective"]["beta"] = 2.0
    job = session.build(config)
    variables = jax.jit(job.init)(jax.random.key(0))
    history = [
        {"epoch": 1, "train/loss": 2.0, "train/reconstruction": 1.0, "train/kl": 1.0}
    ]
    _, numbers = job.report(variables, {}, history)
    flat = job.dataset.splits["train"].image.reshape(1437, -1) / 255
    total = flat.var(axis=0).sum()
    assert numbers["collapsed model"] == pytest.approx(total / 2, rel=1e-4)
    assert numbers["best linear VAE"] < numbers["collapsed model"]


def test_defaults_are_filled_in(config):
    del config["objective"]["beta"]
    assert session.build(config).objective.keywords["beta"] == 1.0


def test_a_slip_in_any_section_is_told_before_data_are_read(config, monkeypatch):
    monkeypatch.setattr(
        session,
        "load",
        functools.wraps(data.load)(lambda **_: pytest.fail("data were read")),
    )
    config["optimizer"]["learning_rat"] = 1.0
    with pytest.raises(
        ValueError,
        match="unknown config field optimizer.learning_rat: did you mean learning_rate",
    ):
        session.build(config)


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("epoch", 3, "unknown config field epoch: did you mean epochs"),
        (
            "model.latent_dims",
            3,
            "unknown config field model.latent_dims: did you mean latent_dim",
        ),
        (
            "optimizer.zzz",
            3,
            "unknown config field optimizer.zzz: there are learning_rate, ",
        ),
        ("model.name", "vea", "unknown model.name 'vea': did you mean vae"),
        ("objective.name", 7, "unknown objective.name 7: there are elbo"),
        (
            "model.latent_dim",
            "twenty",
            "config field model.latent_dim is 'twenty', but must be of type int",
        ),
        ("model.latent_dim", True, "model.latent_dim is True, but must be of type int"),
        (
            "model.encoder_features",
            (32, 4.5),
            r"is \(32, 4.5\), but must be of type tuple\[int, ...\]",
        ),
        ("objective.beta", "1", "objective.beta is '1', but must be of type float"),
        ("data.shuffle", 1, "data.shuffle is 1, but must be of type bool"),
        ("data", 3, "config field data is 3, but must be of type Mapping"),
        ("epochs", 0, "epochs is 0, but must be at least 1"),
        ("batch_size", 0, "batch_size is 0, but must be at least 1"),
        (
            "batch_size",
            1438,
            "batch_size is 1438, but there are 1437 training images: give at most 1437",
        ),
        ("seed", -1, "seed is -1, but must lie in"),
        ("seed", 2**32, "seed is 4294967296, but must lie in"),
        ("seeds", 0, "seeds is 0, but must be at least 1"),
        ("optimizer.average", 1.0, "optimizer.average is 1.0, but must lie in"),
        ("run.keep", 0, "run.keep is 0, but must be at least 1"),
        ("objective.beta", -1.0, "objective.beta is -1.0, but must be at least 0"),
        ("run.chunk", 0, "run.chunk is 0, but must be at least 1"),
        ("model.latent_dim", 0, "model.latent_dim is 0, but must be at least 1"),
        (
            "objective",
            {"name": "cross_entropy"},
            "objective.name cross_entropy does not fit model.name vae: give elbo",
        ),
    ],
)
def test_bad_fields(config, field, value, message):
    refuse(config, field, value, message)


def refuse(config, field, value, message):
    *section, name = field.split(".")
    (config[section[0]] if section else config)[name] = value
    with pytest.raises(ValueError, match=message) as error:
        session.build(config)
    assert "\n" not in str(error.value)


def test_an_unknown_metric_for_the_best_checkpoint(config):
    config["best"] = "los"
    with pytest.raises(
        ValueError, match="unknown metric best 'los': did you mean loss"
    ):
        session.build(config)


def changed(config, field, value):
    *section, name = field.split(".")
    config = copy.deepcopy(config)
    (config[section[0]] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    "field,value",
    [("run.chunk", 3), ("run.profile", True), ("data.manual_dir", "x"), ("epochs", 2)],
)
def test_what_a_run_may_change_as_it_continues(config, field, value):
    stored = json.loads(json.dumps(config))
    assert changes(stored, changed(config, field, value)) == []


@pytest.mark.parametrize(
    "field,value,told",
    [
        ("seed", 2, "seed is 0 there, 2 here"),
        ("epochs", 0, "epochs is 1 there, 0 here"),
        ("model.latent_dim", 3, "model.latent_dim is 20 there, 3 here"),
        (
            "model.encoder_features",
            (32,),
            "model.encoder_features is [32, 64] there, [32] here",
        ),
        ("data.name", "mnist", "data.name is digits there, mnist here"),
        ("objective.beat", 1, "objective.beat is absent there, 1 here"),
    ],
)
def test_what_a_run_may_not_change(config, field, value, told):
    stored = json.loads(json.dumps(config))
    assert changes(stored, changed(config, field, value)) == [told]


def test_epochs_may_not_be_raised_where_the_rate_depends_on_them(config):
    for field, value in [("optimizer.schedule", "cosine"), ("optimizer.warmup", 0.1)]:
        other = changed(config, field, value)
        told = changes(other, changed(other, "epochs", 9))
        assert told == ["epochs is 1 there, 9 here"]


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("objective.label_smoothing", 1.0, r"is 1.0, but must lie in \[0, 1\)"),
        ("objective.label_smoothing", -0.1, "label_smoothing is -0.1"),
        ("objective.shift", 28, "shift is 28, but must be from 0 to 27 pixels"),
        ("objective.shift", -1, "shift is -1"),
        ("objective.shift", 0.5, "objective.shift is 0.5, but must be of type int"),
        ("objective.rotation", 181, r"is 181.0, but must lie in \[0, 180\] degrees"),
        ("objective.rotation", math.nan, "rotation is nan"),
        ("model.features", (8, 0), "model.features is"),
        ("optimizer.weight_decay", -1.0, "weight_decay is -1.0"),
        ("objective", {"name": "elbo"}, "elbo does not fit model.name classifier"),
    ],
)
def test_bad_fields_of_a_classifier(field, value, message):
    refuse(classifier.get_config("smoke").to_dict(), field, value, message)


@pytest.mark.parametrize(
    "label,message",
    [
        (None, "needs labels of at least 2 classes, but the data have 0"),
        (np.zeros(40, int), "needs labels of at least 2 classes, but the data have 1"),
        (
            np.arange(40) % 3 - 1,
            "train images have no label, but the classifier needs all",
        ),
    ],
)
def test_a_classifier_refuses_images_without_labels(tmp_path, label, message):
    labels = {} if label is None else {"label": label}
    np.savez(tmp_path / "own.npz", image=np.zeros((40, 8, 8), np.uint8), **labels)
    config = classifier.get_config("smoke").to_dict()
    config["batch_size"] = 8
    refuse(config, "data.name", str(tmp_path / "own.npz"), message)


def test_what_a_classifier_shows():
    """On predictions with two mistakes, the second of which is the surer one."""
    job = session.build(classifier.get_config("smoke").to_dict())
    label = job.dataset.splits["test"].label
    prediction, confidence = label.copy(), np.full(len(label), 1.0, np.float32)
    prediction[[3, 8]] = (label[[3, 8]] + 1) % 10
    confidence[[3, 8]] = 0.6, 0.9
    arrays = {"test": {"prediction": prediction, "confidence": confidence}}
    history = [{"epoch": 1, "train/loss": 0.5, "train/accuracy": 0.9}]
    draw, numbers = job.report({}, arrays, history)
    drawn = draw()
    assert set(drawn) == {"training", "confusion", "mistakes"}
    titles = [ax.get_title() for ax in drawn["mistakes"].axes if ax.images]
    assert [title.splitlines()[1] for title in titles] == ["90.0 %", "60.0 %"]
    error = numbers["expected calibration error"]
    assert error == pytest.approx((0.6 + 0.9) / 360, rel=1e-5)
    share = np.mean(prediction[label == label[3]] == label[3])
    assert numbers[f"accuracy of class {label[3]}"] == pytest.approx(share)
    assert len(numbers) == 11


def test_a_missing_field(config):
    del config["epochs"]
    with pytest.raises(ValueError, match="config field epochs is missing"):
        session.build(config)


def test_whole_numbers_are_floats_too(config):
    config["objective"]["beta"] = 2
    assert session.build(config).objective.keywords["beta"] == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_variant(name):
    with pytest.raises(ValueError, match="has no variant 'nope': there are default, "):
        CONFIGS[name].get_config("nope")


def test_config_survives_as_plain_data(config):
    before = copy.deepcopy(config)
    session.build(ConfigDict(config).to_dict())
    assert config == before


def test_images_larger_than_the_device_are_refused_with_their_size():
    class Device:
        device_kind = "small GPU"

        def memory_stats(self):
            return {"bytes_limit": 2**20}

    split = Split(np.zeros((2000, 32, 32, 1), np.uint8), np.zeros(2000, np.int32))
    dataset = Dataset({"train": split}, 1, True)
    with pytest.raises(ValueError, match="small GPU has 0.0 GiB"):
        session.check_fits(dataset, Device())
    session.check_fits(dataset, jax.local_devices()[0])
