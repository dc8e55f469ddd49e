"""Devices: the numbers do not depend on how a batch is divided, and the comparison would notice if they did."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import run_job, small_job, stop_after

from configs import classifier, vae, vaegan
from vae_jax.full_evaluation.subject import Subject
from vae_jax.nn import bfloat16
from vae_jax.pretrained import Pretrained
from vae_jax.run import session
from vae_jax.run.devices import Devices, compiler_options
from vae_jax.run.evaluate import map_examples
from vae_jax.steps import eval_metrics, init_state, make_run_steps, make_train_step


def sgd_job(config, model=None, objective=None, rate=1e-3, **changes):
    """Steps by plain SGD, whose updates are the gradients themselves: Adam hides a wrong scale.

    They are small: a pooled maximum that changes place by rounding moves the classifier's gradient by 1e-3.
    """
    config = config.get_config("smoke").to_dict() | {"batch_size": 256} | changes
    for name in config["model"]:
        if "features" in name:
            config["model"][name] = (4,)
    config["model"] |= model or {}
    config["objective"] |= objective or {}
    return session.build(config)._replace(optimizer=optax.sgd(rate))


JOBS = {
    "optimal variance, free bits": lambda: sgd_job(
        vae, model={"likelihood": "optimal_gaussian"}, objective={"free_bits": 0.1}, rate=1e-7
    ),
    "vae": lambda: sgd_job(vae),
    "classifier": lambda: sgd_job(classifier),
    "vaegan": lambda: sgd_job(vaegan, model={"feature_layer": 1}, rate=1e-4),
    "two seeds": lambda: sgd_job(vae, seeds=2),
}


def ten_steps(job, devices, axis_name):
    """The state after ten steps of one order, and the metrics and probes of each test image, per seed."""

    def make_state(root):
        return init_state(job.init(root), job.optimizer, root)

    state = devices.replicate(jax.jit(job.map_seeds(make_state, 1))(job.root()))
    train_step = make_train_step(job.objective, job.optimizer, axis_name)
    run_steps = make_run_steps(train_step, job.batch_size, 5, devices.count)
    run_steps = devices.compile(job.map_seeds(run_steps, 2), training=True)
    image, label = devices.replicate(job.dataset.splits["train"])
    for epoch in (1, 2):
        order = devices.replicate(job.order(epoch))
        state, _ = run_steps(state, order, 0, 5, image, label)

    def measure(variables, batch, keys):
        return eval_metrics(job.objective, variables, batch, keys) | job.probes.measure(variables, batch, None)

    evaluate = map_examples(measure, job.dataset.splits["test"], len(job.seeds), devices=devices)
    return state, evaluate(state.variables, state.key)


def assert_close(tree, other, tolerance=1e-6):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance),
        *jax.device_get((tree, other)),
    )


@pytest.fixture(scope="module")
def alone():
    """The ten steps of a job on one device."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = ten_steps(JOBS[name](), Devices(1), None)
        return made[name]

    return of


@pytest.mark.parametrize(
    "name,count",
    [
        ("vae", 8),
        ("classifier", 8),
        pytest.param("vaegan", 8, marks=pytest.mark.slow),
        pytest.param("two seeds", 2, marks=pytest.mark.slow),
        pytest.param("optimal variance, free bits", 8, marks=pytest.mark.slow),
    ],
)
def test_several_devices_equal_one(alone, name, count):
    """Parameters, BatchNorm's statistics and what evaluation gives; 360 test images are not divisible by 256."""
    state, arrays = alone(name)
    devices = Devices(count)
    other, other_arrays = ten_steps(JOBS[name](), devices, devices.axis_name)
    assert len(jax.tree.leaves(other.params)[0].sharding.device_set) == count
    assert_close(state.variables, other.variables)
    assert set(arrays) == set(other_arrays)
    assert arrays["loss"].shape == ((2, 360) if name == "two seeds" else (360,))
    for metric, values in arrays.items():
        assert other_arrays[metric].shape == values.shape
        np.testing.assert_allclose(values, other_arrays[metric], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_seeds_by_vmap_as_on_a_gpu_equal_one_after_the_other(alone, monkeypatch):
    state, arrays = alone("two seeds")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    other, other_arrays = ten_steps(JOBS["two seeds"](), Devices(1), None)
    assert_close(state.variables, other.variables)
    np.testing.assert_allclose(arrays["loss"], other_arrays["loss"], rtol=1e-5)


def test_a_step_that_does_not_add_up_is_noticed(alone):
    other, _ = ten_steps(JOBS["classifier"](), Devices(8), axis_name=None)
    for part in ("params", "model_state"):
        with pytest.raises(AssertionError):
            assert_close(getattr(alone("classifier")[0], part), getattr(other, part))


@pytest.mark.slow
def test_a_run_continues_on_other_devices(tmp_path):
    """From 1 to 8 and to 1 again, stopped after five of ten steps and after seven."""
    job, config = small_job(steps_per_call=2)
    job = job._replace(optimizer=optax.sgd(1e-3))
    uninterrupted, expected = run_job(job, config, tmp_path / "uninterrupted")
    for count, calls in [(1, 3), (8, 1), (1, 9)]:
        state, directory = run_job(job, config, tmp_path / "parts", stop_after(calls), Devices(count))
    assert_close(uninterrupted.eval_variables, state.eval_variables, 1e-5)
    row, last = expected.history[-1], directory.history[-1]
    assert row["step"] == last["step"] == 10
    assert last["test/loss"] == pytest.approx(row["test/loss"], rel=1e-5)


def weighted_job():
    """A job with two more metrics: one weighted by label, one that counts no example."""
    job, config = small_job({"epochs": 1}, steps_per_call=2)
    plain = job.objective

    def objective(variables, batch, *others):
        metrics, model_state = plain(variables, batch, *others)
        few = jnp.maximum(0, 3 - batch.label).astype(jnp.float32)
        weighted = {"few": (metrics["reconstruction"], few), "none": (metrics["kl"], 0 * few)}
        return metrics | weighted, model_state

    return job._replace(objective=objective, optimizer=optax.sgd(1e-3)), config


@pytest.mark.slow
def test_metrics_with_weights_of_their_own_on_several_devices_equal_one(tmp_path):
    """Rows of metrics.jsonl: sums over devices and calls come before the division; a metric of no example has no row."""
    job, config = weighted_job()
    histories = []
    for count in (1, 8):
        _, directory = run_job(job, config, tmp_path / str(count), devices=Devices(count))
        histories.append(directory.history)
    for row, other in zip(*histories, strict=True):
        assert row.keys() == other.keys()
        for name in row.keys() - {"seconds"}:
            assert row[name] == pytest.approx(other[name], rel=1e-5)
        part = "test" if "test/loss" in row else "train"
        assert f"{part}/none" not in row
        assert abs(row[f"{part}/few"] - row[f"{part}/reconstruction"]) > 0.01


@pytest.mark.parametrize("batch_size,nearest", [(101, 104), (100, 96), (3, 8), (512, None)])
def test_a_batch_that_devices_do_not_divide_is_refused(batch_size, nearest):
    if nearest is None:
        Devices().check_divide(batch_size)
        return
    with pytest.raises(
        ValueError,
        match=f"batch_size {batch_size} is not divisible by 8 devices: give {nearest},",
    ):
        Devices().check_divide(batch_size)


@pytest.mark.parametrize("limit", [9, -1])
def test_devices_that_are_not_there_are_refused(limit):
    with pytest.raises(ValueError, match=f"--devices is {limit}, but there are 8"):
        Devices(limit)


@pytest.mark.parametrize(
    "compile_it",
    [
        lambda job, loaded: job.evaluate_on("test"),
        lambda job, loaded: loaded._functions,
        lambda job, loaded: loaded.log_weights(3),
        lambda job, loaded: Subject(loaded, job.dataset, "test").devices.compile(np.sin),
    ],
    ids=["--mode=evaluate", "methods", "log_likelihood", "--full"],
)
def test_a_model_is_evaluated_with_the_options_of_its_precision(monkeypatch, compile_it):
    def options(training, precision=None):
        found.add((training, precision))
        return {}

    job, _ = small_job({"model.precision": "bfloat16"})
    found = set()
    monkeypatch.setattr(jax, "local_device_count", lambda: 1)
    monkeypatch.setattr("vae_jax.run.devices.compiler_options", options)
    monkeypatch.setattr("vae_jax.pretrained.compiler_options", options)
    compile_it(job, Pretrained(job.metadata, {}))
    assert found == {(False, "bfloat16")}


def test_compiler_options_are_for_cpus_and_change_no_number(monkeypatch):
    def loss(x):
        return jnp.tanh(x @ x).sum()

    x = jax.random.normal(jax.random.key(0), (64, 64))
    expected = jax.value_and_grad(loss)(x)
    monkeypatch.setattr(bfloat16, "is_fast", lambda: True)
    every = [compiler_options(*kind) for kind in ((True,), (False,), (False, "bfloat16"))]
    assert len(set(map(str, every))) == 3
    for options in every:
        compiled = jax.jit(jax.value_and_grad(loss), compiler_options=options)
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4), compiled(x), expected)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert compiler_options(training=True) == {}
