"""Configs: each variant builds, each field is checked, and an error names the field and the nearest name."""

import copy
import functools
import importlib
import inspect
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from etils import epath
from ml_collections import ConfigDict
from small_run import small_job

from configs import classifier, vae
from vae_jax import data, families, steps
from vae_jax.batch import Split, make_batch
from vae_jax.evaluation.baselines import linear_vae_baselines
from vae_jax.families import FAMILIES, Metric
from vae_jax.nn.networks import NETWORKS
from vae_jax.run import hosts, memory, session
from vae_jax.run.config import RunOptions, bind, changes, defaults, fill_in, flatten, make_config
from vae_jax.run.directory import FORMAT
from vae_jax.run.job import Job


@pytest.fixture
def config():
    return vae.get_config("smoke").to_dict()


CONFIGS = {name: importlib.import_module(f"configs.{name}") for name in FAMILIES}
VARIANTS = [(name, v) for name, module in CONFIGS.items() for v in module.VARIANTS]


def test_every_field_is_described():
    described = dict(session.describe())
    configs = [module.get_config().to_dict() for module in CONFIGS.values()]
    assert set(described) == {name for config in configs for name in flatten(config)}
    assert all(described.values()), described
    assert described["model.latent_dim"] == "size of z."
    of_conditional = dict(session.describe("conditional"))
    assert of_conditional["model.prior"].startswith("p(z | c)") and described["model.prior"].startswith("p(z):")
    assert of_conditional["model.likelihood"] == described["model.likelihood"]
    assert inspect.Parameter.empty not in [v for name in FAMILIES for v in flatten(defaults(name)).values()]


def test_top_level_fields_are_described_first_and_sections_in_their_order():
    sections = ["", "data", "model", "objective", "optimizer", "run"]
    order = [name.rpartition(".")[0] for name, _ in session.describe()]
    assert order == sorted(order, key=sections.index) and set(order) == set(sections)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_has_all_fields_and_its_file_says_only_what_differs(name):
    config, file = CONFIGS[name].get_config(), CONFIGS[name]
    assert set(config) == set(inspect.signature(session.make_job).parameters)
    unchanged = flatten(defaults(name))
    required = set(inspect.signature(session.make_job).parameters) - defaults(name).keys()
    assert required == {"epochs", "batch_size", "best"} and required <= file.BASE.keys()
    for values in (file.BASE, *file.VARIANTS.values()):
        assert values.keys() <= unchanged.keys() | required
    for field, value in file.BASE.items():
        assert field in required or unchanged[field] != value
    assert file.VARIANTS["default"] == {}
    assert json.dumps(flatten(config.to_dict()), sort_keys=True) == json.dumps(unchanged | file.BASE, sort_keys=True)


def test_a_variant_changes_the_base_and_the_base_changes_the_defaults():
    base = {"epochs": 3, "batch_size": 8, "best": "kl", "objective.beta": 2.0, "model.latent_dim": 4}
    variants = {"plain": {}, "other": {"seed": 7, "objective.beta": 3.0}}
    plain = make_config("vae", base, variants, "plain").to_dict()
    other = make_config("vae", base, variants, "other").to_dict()
    assert set(changes(plain, other)) == {"seed is 0 there, 7 here", "objective.beta is 2.0 there, 3.0 here"}
    assert set(changes(defaults("vae") | {"epochs": 3}, plain)) == {
        "model.latent_dim is 20 there, 4 here",
        "objective.beta is 1.0 there, 2.0 here",
        "batch_size is absent there, 8 here",
        "best is absent there, kl here",
    }
    assert defaults("vae")["objective"]["beta"] == 1.0  # the defaults themselves have not changed


@pytest.mark.parametrize("name", CONFIGS)
def test_unknown_variant(name):
    message = f"no variant 'nope' of the {name} config: give one of default, "
    with pytest.raises(ValueError, match=message):
        CONFIGS[name].get_config("nope")


LIKELIHOODS_AND_BOUNDS = ("bernoulli", "continuous_bernoulli", "sigma", "logistic", "iwae", "iwae_paper")


@pytest.mark.parametrize(
    "name,variant",
    [pytest.param(*pair, marks=() if pair[1] == "digits" else pytest.mark.slow) for pair in VARIANTS],
)
def test_every_variant_builds_and_traces_its_step(name, variant):
    """On the bundled digits instead of MNIST, whose images have the same shape; some also take two steps."""
    config = CONFIGS[name].get_config(variant).to_dict()
    config["data"]["name"] = "digits"
    config["batch_size"] = 8
    config["data"]["labelled_per_batch"] = min(config["data"]["labelled_per_batch"], 4)
    job = session.build(config)
    image, label = (array[:8] for array in job.dataset.splits["train"])
    batch = make_batch(jnp.asarray(image), label, jnp.ones(8), jnp.arange(8))

    def initial():
        root = jax.random.key(job.seeds[0])
        return steps.init_state(job.init(root), job.optimizer, root)

    step = steps.make_train_step(job.objective, job.optimizer)
    before = jax.eval_shape(initial)
    after, metrics = jax.eval_shape(step, before, batch)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)
    assert metrics["loss"].total.shape == ()
    if variant == "default" or (name == "vae" and variant in LIKELIHOODS_AND_BOUNDS):
        take_two_steps(job, batch)


def take_two_steps(job, batch):
    root = jax.random.key(job.seeds[0])
    state = steps.init_state(jax.jit(job.init)(root), job.optimizer, root)
    step = jax.jit(steps.make_train_step(job.objective, job.optimizer, prepare=job.prepare))
    for _ in range(2):
        state, metrics = step(state, batch)
    assert state.step == 2 and np.isfinite(metrics["loss"].mean)


def test_only_two_recipes_do_not_shuffle():
    shuffled = {name: vae.get_config(name).data.shuffle for name in vae.VARIANTS}
    assert [name for name, shuffle in shuffled.items() if not shuffle] == ["matlab", "iwae_paper"]


def test_the_schedule_spans_the_training(config):
    """After 110 steps, 5 epochs of 22, the cosine has fallen to zero."""
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


def test_the_baselines_are_of_the_training_images_the_model_and_the_objective(config, monkeypatch):
    """The loss of a collapsed model is half the variance of the pixels."""
    given = []

    def baselines(image, latent_dim, beta, scale):
        given.append((latent_dim, beta, scale))
        return linear_vae_baselines(image, latent_dim, beta, scale)

    monkeypatch.setattr(families.reports, "linear_vae_baselines", baselines)
    config["data"]["validation"] = 100
    config["objective"]["beta"] = 2.0
    config["model"]["latent_dim"] = 7
    job = session.build(config)
    assert given == []  # they take a moment, and not every training draws
    numbers = job.baselines()
    flat = job.dataset.splits["train"].image.reshape(1337, -1) / 255
    assert numbers["collapsed model"] == pytest.approx(flat.var(axis=0).sum() / 2, rel=1e-4)
    assert numbers["best linear VAE"] < numbers["collapsed model"]
    assert job.baselines() is numbers and given == [(7, 2.0, 1.0)]


def test_the_seeds_and_what_is_stored_with_a_checkpoint(config):
    config |= {"seed": 5, "seeds": 3}
    job = session.build(config)
    assert job.seeds == range(5, 8)
    roots = jax.random.key_data(job.root())
    expected = [jax.random.key_data(jax.random.key(seed)) for seed in (5, 6, 7)]
    np.testing.assert_array_equal(roots, expected)
    assert job.metadata["config"] == config and job.metadata["image_shape"] == (28, 28, 1)
    assert job.metadata["num_classes"] == 10 and job.metadata["data"]["train"] == 1437


def test_fields_that_a_config_leaves_out_have_their_defaults(config):
    """A config file of one's own, or of a run that an earlier version of the program wrote."""
    left_out = config | {"data": {"name": "digits"}}
    del left_out["patience"]
    stored = session.build(left_out).metadata["config"]
    assert stored["data"] == config["data"] and "patience" not in stored
    session.check_same_config("runs/old", left_out, config)
    with pytest.raises(ValueError, match="patience is {}, but must be"):
        session.build(config | {"patience": {}})
    with pytest.raises(ValueError, match="holds another run .data.binarize is none there, dynamic here.: name"):
        session.check_same_config("runs/old", left_out, config | {"data": config["data"] | {"binarize": "dynamic"}})


def test_only_a_training_needs_the_memory_of_one(config, monkeypatch, tmp_path):
    def check_small(job, device, count):
        assert device == jax.local_devices()[0] and count == 1
        memory.check_fits(job, Device(2**20), count)

    monkeypatch.setattr(session, "check_fits", check_small)
    session.build(config)
    with pytest.raises(ValueError, match="small GPU has 0.1 GiB: take a smaller model or batch, or fewer seeds"):
        session.run(config, str(tmp_path / "run"), 1, hosts.Stop)


@pytest.mark.parametrize(
    "name,value,message",
    [
        ("model", None, "config field model is missing"),
        ("model", "vae", "config field model is 'vae', but must be of type Mapping"),
        ("epochs", None, "config field epochs is missing"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_an_incomplete_config_is_refused_in_a_new_and_in_an_old_directory(
    config, tmp_path, name, value, message, exists
):
    path = str(tmp_path / "run")
    if exists:
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "config.json").write_text(json.dumps({"format": FORMAT} | config))
    broken = {key: old for key, old in config.items() if key != name} | ({name: value} if value else {})
    with pytest.raises(ValueError, match=message):
        session.run(broken, path, 1, hosts.Stop)


@pytest.mark.parametrize("precision,fast,said", [("bfloat16", False, 1), ("bfloat16", True, 0), ("float32", False, 0)])
def test_a_processor_that_gains_nothing_from_bfloat16_says_so(
    config, monkeypatch, tmp_path, capsys, precision, fast, said
):
    monkeypatch.setattr(session.bfloat16, "is_fast", lambda: fast)
    config["model"]["precision"] = precision
    run = epath.Path(tmp_path / "run")
    directory, _, progress = session.open_run(session.build(config), str(run), run / "checkpoints", config, 1)
    directory.close()
    progress.close()
    assert capsys.readouterr().err.count("does not multiply faster than float32") == said


class FixedNetwork:
    """Encodes every image as N(1, e) in each of 20 latents, and decodes every z to a grey image."""

    def __init__(self, **sizes):
        pass

    def init(self, key, image):
        return {"params": {}}

    def apply(self, variables, array, method):
        if method == "decode":
            return jnp.zeros((*array.shape[:-1], 28, 28, 1))
        return jnp.ones((len(array), 20)), jnp.ones((len(array), 20))


def fixed_network(image_shape, latent_dim, channels, dtype, encoder_features, decoder_features, pooling):
    return FixedNetwork()


@pytest.fixture
def terms(monkeypatch):
    """`terms(config)`: the metrics of the VAE's objective on two images, and the beta that they imply."""
    monkeypatch.setitem(NETWORKS, "conv", fixed_network)

    def measure(config):
        job = session.build(config)
        image, label = (jnp.asarray(array[:2]) for array in job.dataset.splits["test"])
        batch = make_batch(image, label, jnp.ones(2), jnp.arange(2))
        found = steps.make_eval_step(job.objective)({"params": {}}, batch, jax.random.key(0))
        return found, (found["loss"] - found["reconstruction"]) / found["kl"]

    return measure


def test_defaults_are_filled_in(config, terms):
    del config["objective"]["beta"]
    found, beta = terms(config)
    np.testing.assert_allclose(beta, 1.0, rtol=1e-5)
    np.testing.assert_allclose(found["bound"], found["loss"], rtol=1e-6)


def test_integers_are_floats_too(config, terms):
    config["objective"]["beta"] = 2
    found, beta = terms(config)
    np.testing.assert_allclose(beta, 2.0, rtol=1e-5)
    np.testing.assert_allclose(found["bound"], found["loss"] - found["kl"], rtol=1e-5)
    bound = bind("objective", families.vae.make_objective, {"beta": 2})
    assert type(bound.keywords["beta"]) is float


def test_functions_take_what_they_name_of_what_is_known():
    def function(model, size=1, *, beta=1.0):
        return model, size, beta

    known = {"model": "m", "beta": 3.0, "image_shape": (1, 1, 1)}
    assert fill_in(function, **known) == ("m", 1, 3.0)
    assert fill_in(functools.partial(function, beta=2.0), model="m") == ("m", 1, 2.0)


def test_an_error_in_any_section_is_raised_before_data_are_read(config, monkeypatch):
    monkeypatch.setattr(
        session,
        "load",
        functools.wraps(data.load)(lambda **_: pytest.fail("data were read")),
    )
    refuse(config, "best", "los", "unknown metric best 'los'")
    config["best"] = "bound"
    message = "unknown config field optimizer.learning_rat: did you mean learning_rate"
    refuse(config, "optimizer.learning_rat", 1.0, message)
    del config["optimizer"]["learning_rat"]
    refuse(config, "run.keep", 0, "run.keep is 0")


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("epoch", 3, "unknown config field epoch: did you mean epochs"),
        ("model.latent_dims", 3, "unknown config field model.latent_dims: did you mean latent_dim"),
        ("optimizer.zzz", 3, "unknown config field optimizer.zzz: there are learning_rate, "),
        ("model.name", "vea", "unknown model.name 'vea': did you mean vae"),
        (
            "model.name",
            7,
            "unknown model.name 7: there are vae, conditional, sparse_labels, semisupervised, stacked, vaegan, classifier",
        ),
        ("optimizer.name", "adm", "unknown optimizer.name 'adm': did you mean adam"),
        ("model.likelihood", "gauss", "model.likelihood is 'gauss', but must be one of unit_gaussian"),
        ("model.prior", "normal", "model.prior is 'normal', but must be one of standard_normal"),
        ("model.latent_dim", "twenty", "config field model.latent_dim is 'twenty', but must be of type int"),
        ("model.latent_dim", True, "model.latent_dim is True, but must be of type int"),
        ("model.encoder_features", (32, 4.5), r"is \(32, 4.5\), but must be of type tuple\[int, ...\]"),
        ("objective.beta", "1", "objective.beta is '1', but must be of type float"),
        ("objective.beta", 1e39, r"objective.beta is 1e\+39, but must be at most 3.4\d+e\+38 in size"),
        ("model.latent_dim", 2**33, "model.latent_dim is 8589934592, but must be at most 4294967296 in size"),
        ("data.shuffle", 1, "data.shuffle is 1, but must be of type bool"),
        ("data", 3, "config field data is 3, but must be of type Mapping"),
        ("epochs", 0, "epochs is 0, but must be at least 1"),
        ("batch_size", -1, "batch_size is -1, but must be at least 0"),
        ("batch_size", 1438, "batch_size is 1438, but there are 1437 training images: give at most 1437"),
        ("seed", -1, "seed is -1, but must lie in"),
        ("seed", 2**32, "seed is 4294967296, but must lie in"),
        ("seeds", 0, "seeds is 0, but must be at least 1"),
        ("optimizer.ema_decay", 1.0, "optimizer.ema_decay is 1.0, but must lie in"),
        ("run.keep", 0, "run.keep is 0, but must be at least 1"),
        ("run.save_every", 0, "run.save_every is 0, but must be at least 1"),
        ("run.figures_every", 0, "run.figures_every is 0, but must be at least 1"),
        ("run.steps_per_call", 0, "run.steps_per_call is 0, but must be at least 1"),
        ("objective.beta", -1.0, "objective.beta is -1.0, but must be at least 0"),
        ("objective.beta", math.nan, "objective.beta is nan, but must be at least 0"),
        ("model.latent_dim", 0, "model.latent_dim is 0, but must be at least 1"),
        ("best", "los", "unknown metric best 'los': did you mean loss"),
        ("best", "accuracy", "unknown metric best 'accuracy': there are loss, reconstruction, kl, bound"),
        ("objective", {"shift": 2}, "unknown config field objective.shift: there are beta"),
        ("objective.name", "elbo", "unknown config field objective.name: there are beta"),
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


@pytest.mark.parametrize("name,metric,better", [("vae", "kl", "lower"), ("classifier", "accuracy", "higher")])
def test_the_family_says_which_direction_of_best_is_better(name, metric, better, monkeypatch):
    """Reversing the direction in METRICS reverses it in the job: no other place knows it."""
    config = CONFIGS[name].get_config("smoke").to_dict() | {"best": metric}
    assert session.build(config).best is None  # there are no validation images
    config["data"]["validation"] = 100
    assert session.build(config).best == (f"validation/{metric}", better)
    other = {"lower": "higher", "higher": "lower"}[better]
    turned = FAMILIES[name].METRICS[metric]._replace(better=other)
    monkeypatch.setitem(FAMILIES[name].METRICS, metric, turned)
    assert session.build(config).best == (f"validation/{metric}", other)


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_of_all_metrics_only_the_accuracy_is_better_when_higher(family):
    higher = {name for name, metric in family.METRICS.items() if metric.better == "higher"}
    assert higher == {"accuracy"} & family.METRICS.keys()


def test_a_metric_without_a_direction_cannot_mark_the_best(monkeypatch, config):
    monkeypatch.setitem(families.vae.METRICS, "scale", Metric("scale of the noise", "pixels"))
    refuse(config, "best", "scale", "unknown metric best 'scale': there are loss, reconstruction, kl, bound$")


def changed(config, field, value):
    *section, name = field.split(".")
    config = copy.deepcopy(config)
    (config[section[0]] if section else config)[name] = value
    return config


@pytest.mark.parametrize(
    "field,value",
    [("run.steps_per_call", 3), ("run.profile", True), ("data.manual_dir", "x"), ("epochs", 2)],
)
def test_what_a_run_may_change_when_it_continues(config, field, value):
    stored = json.loads(json.dumps(config))
    assert changes(stored, changed(config, field, value)) == []


@pytest.mark.parametrize(
    "field,value,message",
    [
        ("seed", 2, "seed is 0 there, 2 here"),
        ("epochs", 0, "epochs is 1 there, 0 here"),
        ("best", "kl", "best is bound there, kl here"),
        ("model.latent_dim", 3, "model.latent_dim is 20 there, 3 here"),
        ("model.encoder_features", (32,), "model.encoder_features is [] there, [32] here"),
        ("data.name", "mnist", "data.name is digits there, mnist here"),
        ("objective.beat", 1, "objective.beat is absent there, 1 here"),
    ],
)
def test_what_a_run_may_not_change(config, field, value, message):
    stored = json.loads(json.dumps(config))
    assert changes(stored, changed(config, field, value)) == [message]


def test_epochs_may_not_be_raised_where_the_rate_depends_on_them(config):
    for field, value in [("optimizer.schedule", "cosine"), ("optimizer.warmup", 0.1)]:
        other = changed(config, field, value)
        found = changes(other, changed(other, "epochs", 9))
        assert found == ["epochs is 1 there, 9 here"]


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
        ("best", "bound", "unknown metric best 'bound': there are loss, accuracy"),
        ("objective", {"beta": 1.0}, "unknown config field objective.beta: there are label_smoothing, shift, rotation"),
        ("model.latent_dim", 2, "unknown config field model.latent_dim: there are features, precision"),
    ],
)
def test_bad_fields_of_a_classifier(field, value, message):
    refuse(classifier.get_config("smoke").to_dict(), field, value, message)


@pytest.mark.parametrize(
    "label,message",
    [
        (None, "32 of 32 train images have no label, but the classifier needs all labels"),
        (np.zeros(40, int), "needs labels of at least 2 classes, but the data have 1"),
        (np.arange(40) % 3 - 1, r"\d+ of 32 train images have no label, but the classifier needs all labels"),
    ],
)
def test_a_classifier_refuses_images_without_labels(tmp_path, label, message):
    labels = {} if label is None else {"label": label}
    np.savez(tmp_path / "own.npz", image=np.zeros((40, 8, 8), np.uint8), **labels)
    config = classifier.get_config("smoke").to_dict()
    config["batch_size"] = 8
    refuse(config, "data.name", str(tmp_path / "own.npz"), message)


def test_a_class_without_training_images_is_refused(tmp_path):
    image = np.zeros((40, 8, 8), np.uint8)
    np.savez(tmp_path / "own.npz", image=image, label=np.arange(40) % 2 * 2)
    config = classifier.get_config("smoke").to_dict()
    config["batch_size"] = 8
    refuse(config, "data.name", str(tmp_path / "own.npz"), "no training image labelled 1, though labels go up to 2")


def test_building_leaves_the_config_as_it_was(config):
    before = copy.deepcopy(config)
    session.build(ConfigDict(config).to_dict())
    assert config == before


class Device:
    device_kind = "small GPU"

    def __init__(self, limit):
        self.limit = limit

    def memory_stats(self):
        return {"bytes_limit": self.limit} if self.limit else None


@pytest.mark.parametrize("size,held", [(1437, "the training images"), (50_000, "the images of two calls")])
def test_a_training_larger_than_the_device_is_refused_with_its_size(config, size, held):
    """It holds the images, four copies of each seed's weights, and the images decoded from its share of a batch."""
    job = session.build(config | {"seeds": 3})
    train = Split(np.broadcast_to(np.uint8(0), (size, 28, 28, 1)), np.zeros(size, np.int32))
    job = job._replace(dataset=job.dataset._replace(splits={"train": train}))
    weights = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(job.init, jax.random.key(0))))
    images = 1437 if size == 1437 else 2 * 3 * job.steps_per_call * 512
    for decodes, count in [(1, 1), (50, 8), (50, 16)]:
        larger = job._replace(decodes_per_example=decodes)
        decoded = 512 * decodes * 28 * 28 // count
        needed = images * 28 * 28 + 4 * (3 * 4 * weights + decoded)
        session.check_fits(larger, Device(needed), count)
        message = rf"3 models of {weights:,} weights and {held} need \d\.\d GiB of memory, but small GPU has"
        with pytest.raises(ValueError, match=message) as error:
            session.check_fits(larger, Device(needed - 1), count)
        assert "\n" not in str(error.value)
        assert ("run.steps_per_call" in str(error.value)) == (size > 1437)


def test_images_stay_on_a_device_that_they_fill_to_one_half():
    assert memory.stays_on(Device(200), 100) and not memory.stays_on(Device(199), 100)


@pytest.mark.parametrize("device", [None, Device(None)])
def test_without_a_limit_of_the_device_the_free_memory_counts(monkeypatch, device):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=3 * 2**30))
    memory.check_memory("ten images", 3 * 2**30, "take fewer", device)
    message = r"^ten images need 3\.1 GiB of memory, but this machine has 3\.0 GiB free: take fewer$"
    with pytest.raises(ValueError, match=message):
        memory.check_memory("ten images", 3 * 2**30 + 1, "take fewer", device)
    memory.check_memory("ten images", 2**40, "take fewer", Device(2**40))  # its own limit comes first


def test_options_of_a_run_are_those_of_its_section(config):
    config["run"] |= {"steps_per_call": 3, "keep": 5}
    assert isinstance(session.build(config), Job)
    assert session.build(config).run == RunOptions(steps_per_call=3, keep=5, likelihood_samples=0)


def test_a_run_directory_is_released_if_its_checkpoints_cannot_be_opened(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("no disk")

    job, config = small_job()
    given = job, str(tmp_path / "run"), tmp_path / "run" / "checkpoints", config, 1
    with monkeypatch.context() as broken, pytest.raises(OSError, match="no disk"):
        broken.setattr(session, "Checkpoints", fail)
        session.open_run(*given)
    directory, _, progress = session.open_run(*given)
    progress.close()
    directory.close()
