"""The train step: keys, weights, devices, tracing; the optimizer's schedules."""

import operator

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from configs import vae as vae_config
from vae_jax import families, steps
from vae_jax.batch import Batch, example_keys
from vae_jax.optimizers import make_adam
from vae_jax.steps import Total, init_state, jit_train_step, make_train_step, total

SHAPE = (8, 8, 1)


@pytest.fixture(scope="module")
def model():
    return families.vae.make(SHAPE, latent_dim=3, encoder_features=(4, 4), decoder_features=(4, 4))


@pytest.fixture(scope="module")
def objective(model):
    return families.vae.make_objective(model)


def make_state(model, optimizer, seed=0):
    return init_state(jax.jit(model.init)(jax.random.key(1)), optimizer, jax.random.key(seed))


def make_batch(n=16, seed=0):
    image = jnp.asarray(np.random.default_rng(seed).random((n, *SHAPE), np.float32))
    return Batch(image, -jnp.ones(n, jnp.int32), jnp.ones(n), jnp.arange(n))


def assert_trees_close(a, b, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0), a, b)


def test_same_key_same_output_next_step_other_noise(model, objective):
    step = jax.jit(make_train_step(objective, optax.sgd(0.0)))  # a rate of 0: only the noise can differ
    state = make_state(model, optax.sgd(0.0))
    batch = make_batch()
    after, metrics = step(state, batch)
    _, again = step(state, batch)
    _, later = step(after, batch)
    assert metrics == again
    assert metrics["kl"].mean == later["kl"].mean and metrics["reconstruction"].mean != later["reconstruction"].mean
    _, other_seed = step(make_state(model, optax.sgd(0.0), seed=1), batch)
    assert metrics["reconstruction"].mean != other_seed["reconstruction"].mean


def test_one_step_never_retraces(model, objective):
    optimizer = make_adam(100, schedule="cosine", warmup=0.1)
    step = jit_train_step(objective, optimizer)
    state = make_state(model, optimizer)
    for seed in range(3):
        state, _ = step(state, make_batch(seed=seed))
    assert step._cache_size() == 1
    assert state.step == 3


def test_gradient_descent_is_on_the_weighted_mean_of_the_loss(model, objective):
    """A step of SGD with rate 1 moves the parameters by minus that gradient, computed here anew."""
    state = make_state(model, optax.sgd(1.0))
    batch = make_batch()._replace(weight=jnp.arange(16.0))
    keys = example_keys(state.key, 0, batch.index)

    def mean_loss(params):
        metrics, _ = objective({"params": params}, batch, keys, True, 0)
        return jnp.average(metrics["loss"], weights=batch.weight), metrics

    (loss, each), grads = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))(state.params)
    step = jax.jit(make_train_step(objective, optax.sgd(1.0)))
    after, metrics = step(state, batch)
    moved = jax.tree.map(lambda a, b: a - b, state.params, after.params)
    assert_trees_close(moved, grads, atol=1e-5)
    np.testing.assert_allclose(metrics["loss"].mean, loss, rtol=1e-6)
    np.testing.assert_allclose(metrics["grad_norm"].mean, optax.tree.norm(grads), rtol=1e-5)
    expected = np.average(each["kl"], weights=batch.weight)
    np.testing.assert_allclose(metrics["kl"].mean, expected, rtol=1e-6)


def by_vmap(step):
    mapped = jax.jit(jax.vmap(step, in_axes=(None, 0), out_axes=None, axis_name="devices"))
    return lambda state, batch: mapped(state, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))


def by_pmap(step):
    mapped = jax.pmap(step, axis_name="devices", in_axes=(None, 0), out_axes=None)
    return lambda state, batch: mapped(state, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))


def by_shard_map(step):
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    specs = {"in_specs": (P(), P("devices")), "out_specs": (P(), P())}
    return jax.jit(jax.shard_map(step, mesh=mesh, check_vma=False, **specs))


SHARDS = {None: jax.jit, "vmap": by_vmap, "pmap": by_pmap, "shard_map": by_shard_map}


@pytest.mark.parametrize("shards", ["vmap", "pmap", "shard_map"])
def test_shards_with_an_axis_name_equal_one_device(model, objective, shards):
    state = make_state(model, optax.sgd(0.01))
    batch = make_batch()._replace(weight=jnp.arange(16.0))
    step = make_train_step(objective, optax.sgd(0.01), axis_name="devices")
    alone, _ = jax.jit(make_train_step(objective, optax.sgd(0.01)))(state, batch)
    assert_trees_close(SHARDS[shards](step)(state, batch)[0].params, alone.params, atol=1e-6)


@pytest.fixture(scope="module")
def classifier():
    """Its objective, and the state before the first step of an optimizer."""
    model = families.classifier.make(SHAPE, 3, features=(4, 4, 4))
    variables = jax.jit(model.init)(jax.random.key(1))
    objective = families.classifier.make_objective(model, SHAPE, shift=1, rotation=10.0)
    return objective, lambda optimizer: init_state(variables, optimizer, jax.random.key(0))


def labelled_batch(seed):
    batch = make_batch(seed=seed)
    return batch._replace(label=batch.index % 3)


def test_classifier_seeds_in_one_program_equal_each_alone(classifier):
    objective, initial = classifier
    optimizer = optax.sgd(0.01)
    states = [initial(optimizer).replace(key=jax.random.key(seed)) for seed in range(2)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    step = make_train_step(objective, optimizer)
    together, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(stacked, labelled_batch(0))
    for i, state in enumerate(states):
        alone, _ = jax.jit(step)(state, labelled_batch(0))
        one = jax.tree.map(operator.itemgetter(i), (together.params, together.model_state))
        assert_trees_close(one, (alone.params, alone.model_state), atol=1e-5)


def test_the_objective_sees_the_step_the_axis_and_the_examples_keys():
    calls = []

    def objective(variables, batch, keys, train, step, axis_name=None):
        calls.append((train, axis_name))
        noise = jax.vmap(jax.random.normal)(keys)
        step = jnp.broadcast_to(step, noise.shape).astype(jnp.float32)
        return {"loss": 0 * variables["params"] + step, "noise": noise}, {}

    optimizer = optax.sgd(0.01)
    state, batch = init_state({"params": jnp.zeros(())}, optimizer, jax.random.key(0)), make_batch()
    step = by_vmap(make_train_step(objective, optimizer, "devices"))
    for i in range(3):
        state, metrics = step(state, batch)
        assert metrics["loss"].mean == i and state.step == i + 1
        noise = jax.vmap(jax.random.normal)(example_keys(jax.random.key(0), i, batch.index))
        assert metrics["noise"].mean == pytest.approx(float(noise.mean()), abs=1e-6)
    assert set(calls) == {(True, "devices")}


def test_total_counts_each_example_with_both_weights():
    value, weight, own = (
        jnp.array([1.0, 2.0, 4.0, 8.0]),
        jnp.array([1.0, 1.0, 0.5, 0.0]),
        jnp.array([0.0, 3.0, 2.0, 5.0]),
    )
    assert total(value, weight) == Total(5.0, 2.5) and total(value, weight).mean == 2.0
    assert total((value, own), weight) == Total(6.0 + 4.0, 3.0 + 1.0)
    assert total((value, own), weight).mean == 2.5
    assert total((value, jnp.zeros(4)), weight) == Total(0.0, 0.0)


def total_without_own_weight(value, weight):
    value = value[0] if isinstance(value, tuple) else value
    return Total(jnp.sum(weight * value), jnp.sum(weight))


def total_without_batch_weight(value, weight):
    value, own = value if isinstance(value, tuple) else (value, jnp.ones_like(weight))
    return Total(jnp.sum(own * value), jnp.sum(own))


def total_of_means(value, weight):
    """The mean of each shard, which is then averaged over shards whatever they weigh."""
    mean = total(value, weight).mean
    return Total(jnp.where(jnp.isnan(mean), 0.0, mean), jnp.ones(()))


def weighted_objective(variables, batch, keys, train, step, axis_name=None):
    """A squared distance, over all images, over the labelled ones, over these weighted by their label, and over none."""
    distance = 0.5 * jnp.sum((batch.image - variables["params"]) ** 2, axis=(1, 2, 3))
    labelled = (batch.label >= 0).astype(jnp.float32)
    return {
        "loss": distance,
        "labelled": (distance, labelled),
        "by label": (distance**2, labelled * (1 + batch.label)),
        "none": (distance, jnp.zeros_like(distance)),
    }, {}


def check_weighted_metrics(step):
    """The totals of a step over uneven weights are NumPy's in float64, and only the loss enters its gradient."""
    state = init_state({"params": jnp.full((1, *SHAPE), 0.3)}, optax.sgd(0.01), jax.random.key(0))
    label = jnp.array([-1, -1, 2, -1, 0, 1, -1, 4, -1, -1, 5, -1, 1, 3, -1, 0], jnp.int32)  # two shards have none
    batch = make_batch()._replace(label=label, weight=jnp.arange(16.0) % 5)
    after, metrics = step(state, batch)
    image, weight, label = np.float64(batch.image), np.float64(batch.weight), np.asarray(batch.label)
    distance = 0.5 * np.sum((image - np.float32(0.3)) ** 2, axis=(1, 2, 3))
    expected = {
        "loss": (distance, weight),
        "labelled": (distance, weight * (label >= 0)),
        "by label": (distance**2, weight * np.maximum(1 + label, 0)),
    }
    for name, (value, weights) in expected.items():
        np.testing.assert_allclose(metrics[name].weight, weights.sum(), rtol=1e-6)
        np.testing.assert_allclose(metrics[name].total, np.sum(weights * value), rtol=1e-5)
        np.testing.assert_allclose(metrics[name].mean, np.average(value, weights=weights), rtol=1e-5)
    assert metrics["none"] == Total(0.0, 0.0)
    gradient = np.average(0.3 - image, axis=0, weights=weight)  # the other metrics do not enter it
    np.testing.assert_allclose(after.params[0], 0.3 - 0.01 * gradient, rtol=1e-6)


@pytest.mark.parametrize("shards", SHARDS)
def test_a_metric_with_its_own_weight_is_divided_after_the_sum_over_shards(shards):
    step = make_train_step(weighted_objective, optax.sgd(0.01), "devices" if shards else None)
    check_weighted_metrics(SHARDS[shards](step))


@pytest.mark.parametrize("broken", [total_without_own_weight, total_without_batch_weight, total_of_means])
def test_ignoring_a_weight_is_noticed(monkeypatch, broken):
    monkeypatch.setattr(steps, "total", broken)
    step = make_train_step(weighted_objective, optax.sgd(0.01), "devices")
    with pytest.raises(AssertionError):
        check_weighted_metrics(by_vmap(step))


def learning_rates(optimizer, steps):
    """Adam's first update has the size of the rate; with constant gradients so have all others."""
    params, rates = jnp.zeros(()), []
    state = optimizer.init(params)
    for _ in range(steps):
        update, state = optimizer.update(jnp.ones(()), state, params)
        rates.append(-float(update))
    return np.array(rates)


def test_a_piecewise_rate_is_multiplied_at_its_boundaries():
    fields = {"schedule": "piecewise", "boundaries": (0.3, 0.8), "factors": (0.5, 0.1)}
    rates = learning_rates(make_adam(10, learning_rate=0.1, **fields), 10)
    np.testing.assert_allclose(rates, [0.1] * 3 + [0.05] * 5 + [0.005] * 2, rtol=1e-4)
    fields = {"schedule": "piecewise", "boundaries": (0.5, 0.52), "factors": (0.1, 0.1)}  # both before the same step
    np.testing.assert_allclose(learning_rates(make_adam(10, learning_rate=1.0, **fields), 10)[5:], 0.01, rtol=1e-4)


def test_the_stages_of_burda_et_al():
    """3^i epochs at 0.001 10^(-i/7), rounded to two digits, for i = 0, ..., 7 (Burda et al. 2016, section 5)."""
    config = vae_config.get_config("iwae_paper")
    fields = config.optimizer
    np.testing.assert_allclose(np.multiply(fields.boundaries, config.epochs), np.cumsum(3 ** np.arange(7)))
    rates = fields.learning_rate * np.cumprod([1, *fields.factors])
    np.testing.assert_allclose(rates, 0.001 * 10 ** (-np.arange(8) / 7), rtol=0.02)


def test_clip_norm_shrinks_large_gradients_only():
    """Adam divides by the size of the gradients, so the first two steps show how they were changed."""
    for first, second in [((30.0, 40.0), (3.0, 4.0)), ((3.0, 4.0), (3.0, 4.0))]:
        clipped, plain = make_adam(10, clip_norm=5.0), make_adam(10)
        states = [optimizer.init(jnp.zeros(2)) for optimizer in (clipped, plain)]
        given = [jnp.array(first), jnp.array(second)]
        update, states[0] = clipped.update(given[0], states[0])
        update, _ = clipped.update(given[1], states[0])
        _, states[1] = plain.update(given[0] * min(1, 5 / np.hypot(*first)), states[1])
        expected, _ = plain.update(given[1], states[1])
        np.testing.assert_allclose(update, expected, rtol=1e-5)


def test_schedules():
    np.testing.assert_allclose(learning_rates(make_adam(10), 10), 0.001, rtol=1e-4)
    cosine = learning_rates(make_adam(10, schedule="cosine", learning_rate=0.1), 10)
    np.testing.assert_allclose(cosine, 0.05 * (1 + np.cos(np.pi * np.arange(10) / 10)), rtol=1e-3)
    both = learning_rates(make_adam(10, schedule="cosine", warmup=0.5), 10)
    falling = 0.0005 * (1 + np.cos(np.pi * np.arange(5) / 5))
    expected = [*(0.001 * np.arange(5) / 5), *falling]
    np.testing.assert_allclose(both, expected, rtol=1e-3, atol=1e-9)
    warm = learning_rates(make_adam(10, warmup=0.5), 10)
    np.testing.assert_allclose(warm, 0.001 * np.minimum(np.arange(10) / 5, 1), rtol=1e-3, atol=1e-9)


def test_onecycle_rises_from_a_25th_and_falls_to_nothing():
    rates = learning_rates(make_adam(100, schedule="onecycle", learning_rate=0.1, warmup=0.3), 101)

    def half_cosine(start, end, steps):
        share = (1 - np.cos(np.pi * np.arange(steps) / steps)) / 2
        return start + (end - start) * share

    rising, falling = half_cosine(0.1 / 25, 0.1, 30), half_cosine(0.1, 0.1 / 25e4, 70)
    expected = [*rising, *falling, 0.1 / 25e4]
    np.testing.assert_allclose(rates, expected, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize(
    "base_batch_size,scaling,factor",
    [(128, "sqrt", 2), (128, "linear", 4), (1024, "linear", 0.5), (0, "sqrt", 1)],
)
def test_the_rate_grows_with_the_batch(base_batch_size, scaling, factor):
    fields = {"base_batch_size": base_batch_size, "scaling": scaling}
    rates = learning_rates(make_adam(10, 512, warmup=0.5, **fields), 7)
    np.testing.assert_allclose(rates[[1, 6]], 0.001 * factor * np.array([0.2, 1]), 1e-4)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_weight_decay_is_decoupled(weight_decay):
    """With constant gradients Adam moves by the rate; AdamW by the rate times (1 + weight_decay * parameter)."""
    optimizer = make_adam(10, learning_rate=0.1, weight_decay=weight_decay)
    params = {"kernel": jnp.array([3.0, -2.0]), "bias": jnp.array([5.0])}
    state = optimizer.init(params)
    expected = jax.tree.map(np.asarray, params)
    for _ in range(3):
        grads = jax.tree.map(jnp.ones_like, params)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        expected = jax.tree.map(lambda p: p - 0.1 * (1 + weight_decay * p), expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params, expected)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"weight_decay": -0.1}, "weight_decay is -0.1, but must be at least 0"),
        ({"weight_decay": np.inf}, "weight_decay is inf"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"learning_rate": np.inf}, "learning_rate is inf"),
        ({"beta1": 1.0}, "beta1 is 1.0"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0, but must be at least 0"),
        ({"boundaries": (0.5,)}, "factors is \\(\\), but must be one number above 0 for each boundary"),
        ({"boundaries": (0.5,), "factors": (0.1,)}, "left out unless schedule is piecewise"),
        ({"schedule": "piecewise", "boundaries": (0.5, 0.2), "factors": (1.0, 1.0)}, "increasing numbers in"),
        ({"base_batch_size": -1}, "base_batch_size is -1, but must be at least 0"),
        ({"scaling": "square"}, "scaling is 'square', but must be one of sqrt, linear"),
    ],
)
def test_bad_optimizer(fields, message):
    with pytest.raises(ValueError, match=message):
        make_adam(10, **fields)
