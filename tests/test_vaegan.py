"""The VAE/GAN: which network gets which gradient, against the paper's three updates; its limits; all else as for a VAE."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from small_run import assert_same_state, run_job, stop_after, without_time

import vae_jax
from configs import vaegan as config_file
from experiments import vaegan as comparison
from vae_jax import commands, data, objectives
from vae_jax.batch import Batch, Split, example_keys, named_key
from vae_jax.evaluation.gradients import gradient_routing
from vae_jax.evaluation.samples import sharpness
from vae_jax.evaluation.verdict import discriminator_wins, verdict
from vae_jax.families import vae, vaegan
from vae_jax.likelihoods import unit_gaussian
from vae_jax.model import Model
from vae_jax.nn.discriminator import Discriminator
from vae_jax.optimizers import make_adam
from vae_jax.priors import standard_normal
from vae_jax.run import session
from vae_jax.steps import init_state, make_train_step

SHAPE = (8, 8, 1)
SIZES = {"latent_dim": 3, "encoder_features": (4, 4), "decoder_features": (4, 4)}
NETWORKS = vaegan.GROUPS
FEATURES = 5  # of the toy's discriminator


def toy():
    """Images of 2x2 pixels, three latents, and networks of one or two dense layers: the routing is the objective's."""

    def flat(image):
        return image.reshape(len(image), -1)

    def encode(variables, image):
        return tuple(jnp.split(flat(image) @ variables["params"]["encoder"], 2, axis=-1))

    def decode_raw(variables, z):
        return (z @ variables["params"]["decoder"]).reshape(*z.shape[:-1], 2, 2, 1)

    def discriminate(variables, image):
        weights = variables["params"]["discriminator"]
        features = jnp.tanh(flat(image) @ weights["features"])
        return features @ weights["logit"], features

    model = Model(
        init=None,
        latent_dim=3,
        encode=encode,
        decode_raw=decode_raw,
        likelihood=unit_gaussian(),
        prior=standard_normal(3),
        features=lambda variables, image: discriminate(variables, image)[1],
        apply=discriminate,
    )
    shapes = {
        "encoder": (4, 6),
        "decoder": (3, 4),
        "discriminator": {"features": (4, FEATURES), "logit": (FEATURES,)},
    }
    rng = np.random.default_rng(0)

    def draw(shape):
        return jnp.asarray(rng.standard_normal(shape), jnp.float32)

    return model, {"params": jax.tree.map(draw, shapes, is_leaf=lambda shape: isinstance(shape, tuple))}


@functools.cache
def small(layer=2):
    """The family's own model, small, and variables that are not those of its start, where q(z | x) is nearly the prior."""
    model = vaegan.make(SHAPE, **SIZES, discriminator_features=(4, 6, 8), feature_layer=layer)
    noise = map(jax.random.key, itertools.count(1))
    variables = jax.jit(model.init)(jax.random.key(0))
    return model, jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(noise), leaf.shape), variables)


def make_batch(n=6, shape=SHAPE):
    image = np.random.default_rng(0).random((n, *shape), np.float32)
    return Batch(jnp.asarray(image), -jnp.ones(n, jnp.int32), jnp.ones(n), jnp.arange(n))


def keys_of(batch, step=3):
    return example_keys(jax.random.key(7), step, batch.index)


def metrics_of(model, variables, batch, train=True, **fields):
    objective, step = vaegan.make_objective(model, **fields), 3 if train else None
    run = jax.jit(lambda variables: objective(variables, batch, keys_of(batch, step), train, step)[0])
    return run(variables)


def gradient(function, params):
    return jax.jit(jax.grad(function))(params)


# Which network gets which gradient

ZERO, SOME = 0, 1
ROUTING = {  # section 3.2 and algorithm 1 of the paper; columns: encoder, decoder, discriminator
    "kl": (SOME, ZERO, ZERO),
    "reconstruction": (ZERO, ZERO, ZERO),  # of the pixels: measured, not trained on
    "feature_reconstruction": (SOME, SOME, ZERO),
    "adversarial": (ZERO, SOME, ZERO),
    "discriminator": (ZERO, ZERO, SOME),
    "penalty": (ZERO, ZERO, SOME),
    "loss": (SOME, SOME, SOME),
}
OPTIONS = [
    {},
    {"gamma": 0.5},
    {"saturating": True},
    {"judge_reconstructions": True},
    {"saturating": True, "judge_reconstructions": True, "gamma": 0.1},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "default")


def toy_batch(n=6):
    return make_batch(n, (2, 2, 1))


def check_routing(**options):
    model, variables = toy()
    batch = toy_batch()
    objective = vaegan.make_objective(model, penalty=2.0, **options)
    route = jax.jit(lambda variables: gradient_routing(objective, variables, batch, keys_of(batch), vaegan.TERMS))
    found = route(variables)
    assert set(found) == set(ROUTING)
    for term, expected in ROUTING.items():
        assert tuple(int(found[term][network] != 0) for network in NETWORKS) == expected, term


@every_option
def test_each_term_trains_its_networks_and_leaves_the_others_an_exact_zero(options):
    check_routing(**options)


def published(params, network, fields):
    """The objective that the paper gives to one network, all of it differentiable and without a stopped gradient.

    The decoder's is gamma R / n - (1 - gamma) L_GAN with L_GAN as the discriminator sees it, or its non-saturating
    form.
    """
    model, variables = toy()
    batch = toy_batch()
    variables = {"params": {**variables["params"], network: params}}
    mean, logvar = model.encode(variables, batch.image)
    noise = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, 0), (3,)))
    z = mean + jnp.exp(logvar / 2) * noise(named_key(keys_of(batch), "noise"))
    z_p = jax.vmap(lambda key: jax.random.normal(key, (1, 3))[0])(named_key(keys_of(batch), "prior"))
    again, sampled = (jax.nn.sigmoid(model.decode_raw(variables, code)) for code in (z, z_p))

    def look(image):
        logit, features = model.apply(variables, image)
        return jax.nn.sigmoid(logit), features

    (p_data, f_data), (p_again, f_again), (p_sampled, _) = map(look, (batch.image, again, sampled))
    fakes = [p_sampled, p_again] if fields.get("judge_reconstructions") else [p_sampled]
    similarity = 0.5 * jnp.sum((f_data - f_again) ** 2, axis=-1)
    kl = 0.5 * jnp.sum(jnp.exp(logvar) + mean**2 - 1 - logvar, axis=-1)
    fooled = [jnp.log(1 - p) if fields.get("saturating") else -jnp.log(p) for p in fakes]
    gamma = fields.get("gamma", 0.99)
    per_example = {
        "encoder": kl + similarity,
        "decoder": gamma * similarity / FEATURES + (1 - gamma) * sum(fooled) / len(fooled),
        "discriminator": -0.5 * (jnp.log(p_data) + sum(jnp.log(1 - p) for p in fakes) / len(fakes)),
    }
    return per_example[network].mean()


def check_updates(**fields):
    """The gradient of the one scalar is for each network that of the paper's objective; the decoder's is it times n /
    gamma.
    """
    model, variables = toy()
    batch = toy_batch()
    objective = vaegan.make_objective(model, **fields)

    def loss(params):
        return objective({"params": params}, batch, keys_of(batch), True, 3)[0]["loss"].mean()

    grads = gradient(loss, variables["params"])
    for network in NETWORKS:
        own = functools.partial(published, network=network, fields=fields)
        scale = FEATURES / fields.get("gamma", 0.99) if network == "decoder" else 1.0
        expected = optax.tree.scale(scale, gradient(own, variables["params"][network]))
        size = float(optax.tree.norm(expected))
        assert size > 1e-4
        error = optax.tree.norm(jax.tree.map(jnp.subtract, grads[network], expected))
        assert float(error) < 1e-4 * size, network


@every_option
def test_the_one_scalar_gives_the_three_updates_of_the_paper(options):
    check_updates(**options)


MUTANTS = {
    "no gradient is stopped": ("stop_gradient", lambda tree: tree),
    "the decoder helps the discriminator (a library's bug)": (
        "generator_loss",
        lambda on_fakes, saturating: -objectives.generator_loss(on_fakes, saturating),
    ),
    "the decoder gets the discriminator's loss": (
        "generator_loss",
        lambda on_fakes, saturating: objectives.discriminator_loss(on_fakes[0], on_fakes),
    ),
    "gamma weighs the sum over features": ("weight_of_adversarial", lambda gamma, features: (1 - gamma) / gamma),
    "the discriminator takes samples for data": (
        "discriminator_loss",
        lambda on_data, on_fakes: objectives.discriminator_loss(-on_data, -on_fakes),
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=["default", "other"])
def test_mutants_are_caught(mutant, options, monkeypatch):
    monkeypatch.setattr(vaegan, *MUTANTS[mutant])
    with pytest.raises(AssertionError):
        check_updates(**options)


@pytest.mark.parametrize("options", OPTIONS[3:])
def test_a_gradient_that_is_stopped_for_the_variables_alone_is_caught(options, monkeypatch):
    """Then the adversarial term on reconstructions reaches the encoder, and L_D the decoder."""
    stop = jax.lax.stop_gradient
    monkeypatch.setattr(vaegan, "stop_gradient", lambda tree: stop(tree) if isinstance(tree, dict) else tree)
    with pytest.raises(AssertionError):
        check_routing(**options)


def test_stopped_images_alone_are_not_enough(monkeypatch):
    """Then R and A train the discriminator."""
    stop = jax.lax.stop_gradient
    monkeypatch.setattr(vaegan, "stop_gradient", lambda tree: tree if isinstance(tree, dict) else stop(tree))
    with pytest.raises(AssertionError):
        check_routing()


@pytest.mark.parametrize("saturating", [True, False])
def test_the_decoder_works_against_the_discriminator(saturating):
    """Of one image: grad A = -2 grad L_D where it saturates, else that times (1 - D) / D; L_D with images that are not
    stopped.
    """
    model, variables = toy()
    batch = toy_batch(1)

    def adversarial(decoder):
        changed = {"params": {**variables["params"], "decoder": decoder}}
        return metrics_of(model, changed, batch, saturating=saturating)["adversarial"].mean()

    def discriminator(decoder):
        changed = {"params": {**variables["params"], "decoder": decoder}}
        z = jax.random.normal(named_key(keys_of(batch), "prior")[0], (1, 3))
        fake = jax.nn.sigmoid(model.decode_raw(changed, z))
        on_data, on_fake = (model.apply(variables, image)[0] for image in (batch.image, fake))
        return objectives.discriminator_loss(on_data, on_fake[None]).mean()

    found, other = (gradient(f, variables["params"]["decoder"]) for f in (adversarial, discriminator))
    share = float(metrics_of(model, variables, batch)["discriminator_on_samples"][0])
    factor = -2 * (1 if saturating else (1 - share) / share)
    expected = jax.tree.map(lambda leaf: factor * leaf, other)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-7), found, expected)


# The terms


def test_a_discriminator_that_knows_nothing_has_the_loss_ln_2():
    zero = jnp.zeros(4)
    np.testing.assert_allclose(objectives.discriminator_loss(zero, zero[None]), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(objectives.generator_loss(zero[None], False), math.log(2), rtol=1e-6)
    np.testing.assert_allclose(objectives.generator_loss(zero[None], True), -math.log(2), rtol=1e-6)


def test_the_best_discriminator_has_the_loss_ln_2_less_the_jensen_shannon_divergence():
    """Goodfellow et al. 2014, theorem 1, on three outcomes: logit log(p / q); any other logit is worse."""
    p, q = np.array([0.5, 0.3, 0.2]), np.array([0.1, 0.3, 0.6])
    middle = (p + q) / 2
    divergence = 0.5 * np.sum(p * np.log(p / middle)) + 0.5 * np.sum(q * np.log(q / middle))

    def loss(logit):
        alone, nothing = jnp.full(3, 1e4), jnp.full((1, 3), -1e4)  # a side that costs nothing
        of_data = objectives.discriminator_loss(jnp.asarray(logit, jnp.float32), nothing)
        of_fakes = objectives.discriminator_loss(alone, jnp.asarray(logit, jnp.float32)[None])
        return float(np.sum(p * np.float64(of_data) + q * np.float64(of_fakes)))

    best = np.log(p / q)
    assert loss(best) == pytest.approx(math.log(2) - divergence, abs=1e-6)
    for shift in np.eye(3):
        assert loss(best + 0.3 * shift) > loss(best) < loss(best - 0.3 * shift)


def test_terms_are_finite_for_certain_discriminators():
    sure = jnp.array([1e3, -1e3])
    assert objectives.generator_loss(sure[None], False).tolist() == [0.0, 1e3]
    assert objectives.generator_loss(sure[None], True).tolist() == [-1e3, 0.0]
    assert objectives.discriminator_loss(sure, sure[None]).tolist() == [5e2, 5e2]


def test_parts_of_the_loss_sum_to_it():
    """loss = beta KL + R + n (1 - gamma) / gamma A + L_D + penalty."""
    model, variables = toy()
    found = metrics_of(model, variables, toy_batch(), beta=2.0, gamma=0.2, penalty=3.0)
    parts = 2 * found["kl"] + found["feature_reconstruction"] + found["discriminator"] + found["penalty"]
    expected = np.float64(parts) + FEATURES * (0.8 / 0.2) * np.float64(found["adversarial"])
    np.testing.assert_allclose(found["loss"], expected, rtol=1e-5)
    np.testing.assert_allclose(found["penalty"], 1.5 * vaegan.slope(model, variables, toy_batch().image), rtol=1e-5)


def test_shares_are_of_data_and_of_samples():
    """D(x_p) is that of samples where the discriminator judges reconstructions too."""
    model, variables = toy()
    batch = toy_batch()
    z_p = vaegan.draw_prior(model, variables, keys_of(batch))
    sampled = jax.nn.sigmoid(model.decode_raw(variables, z_p))
    for options in ({}, {"judge_reconstructions": True}):
        found = metrics_of(model, variables, batch, **options)
        for name, image in (("data", batch.image), ("samples", sampled)):
            share = jax.nn.sigmoid(model.apply(variables, image)[0])
            np.testing.assert_allclose(found[f"discriminator_on_{name}"], share, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("layer,features", [(1, 4 * 4 * 4), (2, 2 * 2 * 6), (3, 8)])
def test_the_features_are_those_after_the_chosen_convolution(layer, features):
    model, variables = small(layer)
    image = make_batch().image
    found = model.features(variables, image)
    assert found.shape == (6, features)
    weights = {"params": variables["params"]["discriminator"]}
    expected = Discriminator((4, 6, 8)).apply(weights, image)[1][layer - 1]
    np.testing.assert_array_equal(found, expected.reshape(6, -1))


def test_the_bound_is_that_of_the_pixels():
    """The pixels' reconstruction, KL and bound are those of the family vae with the same networks."""
    model, variables = small()
    batch = make_batch()
    found = metrics_of(model, variables, batch)
    plain = vae.make(SHAPE, **SIZES)
    expected, _ = vae.make_objective(plain)(variables, batch, keys_of(batch), True, 3)
    for name in ("reconstruction", "kl", "bound"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def linear_discriminator(weight):
    return Model(init=None, apply=lambda variables, image: (image.reshape(len(image), -1) @ weight, image))


def test_the_slope_of_a_linear_discriminator_is_its_weight():
    weight = jax.random.normal(jax.random.key(0), (64,))
    found = vaegan.slope(linear_discriminator(weight), {}, make_batch().image)
    np.testing.assert_allclose(found, np.full(6, np.sum(np.float64(weight) ** 2)), rtol=1e-5)


def test_the_slope_is_each_images_own():
    model, variables = small()
    image = make_batch().image
    one = jax.jit(jax.grad(lambda image: model.apply(variables, image[None])[0][0]))
    expected = [float(jnp.sum(one(single) ** 2)) for single in image]
    np.testing.assert_allclose(vaegan.slope(model, variables, image), expected, rtol=1e-4)
    assert "penalty" not in metrics_of(*toy(), toy_batch(), train=False, penalty=3.0)


@pytest.mark.slow
def test_the_penalty_lowers_the_slope():
    """A second derivative, through the primitives of the convolution: its gradient points uphill by a finite
    difference.
    """
    model, variables = small()
    image, params = make_batch().image, variables["params"]

    def mean_slope(discriminator):
        return vaegan.slope(model, {"params": {**params, "discriminator": discriminator}}, image).mean()

    grads = gradient(mean_slope, params["discriminator"])
    size = float(optax.tree.norm(grads))

    def moved(by):
        return jax.tree.map(lambda leaf, grad: leaf + by / size * grad, params["discriminator"], grads)

    step = 2e-4  # no activation changes its sign
    difference = (float(mean_slope(moved(step))) - float(mean_slope(moved(-step)))) / (2 * step)
    assert difference == pytest.approx(size, rel=2e-2)


def test_no_image_changes_the_verdict_on_another():
    model, variables = small()
    image = make_batch().image
    together, alone = (model.apply(variables, part)[0][:2] for part in (image, image[:2]))
    np.testing.assert_allclose(together, alone, rtol=1e-6)


def test_samples_have_noise_of_their_own():
    """z_p belongs to the example and the step, and is not the noise of its reconstruction."""
    model, variables = toy()
    batch = toy_batch()
    z_p = vaegan.draw_prior(model, variables, keys_of(batch))
    few = vaegan.draw_prior(model, variables, keys_of(batch)[2:4])
    np.testing.assert_array_equal(z_p[2:4], few)
    assert (z_p != vaegan.draw_prior(model, variables, keys_of(batch, 4))).all()
    zero = jnp.zeros((6, 3))
    assert (z_p != objectives.reparameterize(zero, zero, keys_of(batch))[0]).all()


# Limits: the plain VAE, the plain GAN, no adversarial term


@pytest.mark.slow
def test_the_method_vae_is_the_family_vae():
    """The same first weights, and the same loss and gradient; the discriminator's is exactly 0."""
    model, plain = vaegan.make(SHAPE, **SIZES), vae.make(SHAPE, **SIZES)
    variables, other = (jax.jit(made.init)(jax.random.key(5)) for made in (model, plain))
    for name in ("encoder", "decoder"):
        jax.tree.map(np.testing.assert_array_equal, variables["params"][name], other["params"][name])
    batch = make_batch()

    def loss(make, params):
        return make({"params": params}, batch, keys_of(batch), True, 3)[0]["loss"].mean()

    grads = gradient(functools.partial(loss, vaegan.make_objective(model, method="vae", beta=0.5)), variables["params"])
    expected = gradient(functools.partial(loss, vae.make_objective(plain, beta=0.5)), other["params"])
    assert float(optax.tree.norm(grads.pop("discriminator"))) == 0
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected)


@pytest.mark.slow
def test_the_method_gan_leaves_the_encoder_alone():
    model, variables = toy()
    found = metrics_of(model, variables, toy_batch(), method="gan")
    np.testing.assert_allclose(found["loss"], found["adversarial"] + found["discriminator"], rtol=1e-6)
    assert "feature_reconstruction" not in found and "kl" in found
    grads = gradient(
        lambda params: metrics_of(model, {"params": params}, toy_batch(), method="gan")["loss"].mean(),
        variables["params"],
    )
    norms = [float(optax.tree.norm(grads[network])) for network in NETWORKS]
    assert norms[0] == 0 and norms[1] > 0 and norms[2] > 0
    said = vaegan.ledger(model, {f"test/{name}": 1.0 for name in found}, "test", 16, False)
    assert [*said] == ["the numbers measure"] and "an encoder that nothing trains" in said["the numbers measure"]


def test_gamma_1_leaves_the_adversarial_term_out():
    model, variables = toy()

    def decoder(name, **fields):
        def mean(decoder):
            changed = {"params": {**variables["params"], "decoder": decoder}}
            return metrics_of(model, changed, toy_batch(), **fields)[name].mean()

        return gradient(mean, variables["params"]["decoder"])

    found, expected = decoder("loss", gamma=1.0), decoder("feature_reconstruction")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), found, expected)


# An optimizer for each network


@pytest.mark.slow
def test_each_network_has_its_rate_and_adam_of_its_own():
    """Two steps equal those of three Adams; a clipped norm is each network's own."""
    model, variables = toy()
    params, batch = variables["params"], toy_batch()
    objective = vaegan.make_objective(model)
    rates = (0.5, 1.0, 0.25)
    optimizer = make_adam(10, groups=NETWORKS, learning_rate=0.01, rate_multipliers=rates, clip_norm=0.1)
    step = jax.jit(make_train_step(objective, optimizer, groups=NETWORKS))
    state = init_state(variables, optimizer, jax.random.key(7))
    alone = {network: make_adam(10, learning_rate=0.01 * rate, clip_norm=0.1) for network, rate in zip(NETWORKS, rates)}
    states = {network: alone[network].init(params[network]) for network in NETWORKS}
    for i in range(2):
        keys = example_keys(jax.random.key(7), i, batch.index)
        grads = gradient(lambda p: objective({"params": p}, batch, keys, True, i)[0]["loss"].mean(), params)  # noqa: B023
        for network in NETWORKS:
            updates, states[network] = alone[network].update(grads[network], states[network], params[network])
            params = {**params, network: optax.apply_updates(params[network], updates)}
        state, metrics = step(state, batch)
        norms = [float(metrics[f"grad_norm/{network}"].mean) for network in NETWORKS]
        np.testing.assert_allclose(norms, [optax.tree.norm(grads[network]) for network in NETWORKS], rtol=1e-3)
        assert float(metrics["grad_norm"].mean) == pytest.approx(math.hypot(*norms), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, params)


@pytest.mark.parametrize(
    "groups,rates,message",
    [
        (
            NETWORKS,
            (1.0, 2.0),
            "is \\(1.0, 2.0\\), but must be one number above 0 for each of encoder, decoder, discriminator",
        ),
        (NETWORKS, (1.0, 0.0, 1.0), "is \\(1.0, 0.0, 1.0\\), but must be one number above 0"),
        ((), (1.0,), "is \\(1.0,\\), but must be left out: this family has one optimizer"),
    ],
)
def test_bad_rates(groups, rates, message):
    with pytest.raises(ValueError, match=f"optimizer.rate_multipliers {message}"):
        make_adam(10, groups=groups, rate_multipliers=rates)


# Bad input


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"feature_layer": 4}, "model.feature_layer is 4, but the discriminator has convolutions 1 to 3"),
        ({"feature_layer": 0}, "model.feature_layer is 0, but the discriminator has convolutions 1 to 3"),
        (
            {"discriminator_features": (4, 4, 4, 4)},
            "model.discriminator_features has 4 entries, but images of 8x8 can be halved 3 times: give it fewer",
        ),
        ({"discriminator_features": ()}, "model.discriminator_features is \\(\\), but must be at least 1"),
        ({"likelihood": "optimal_gaussian"}, "whose variance nothing here trains: take another"),
    ],
)
def test_bad_models(fields, message):
    with pytest.raises(ValueError, match=message):
        vaegan.make(SHAPE, **{"decoder_features": (4, 4), **fields})


@pytest.mark.parametrize(
    "fields,message",
    [
        *(({"gamma": gamma}, f"gamma is {gamma}, but must lie in \\(0, 1\\]") for gamma in (0.0, -0.1, 1.1, math.nan)),
        ({"penalty": -1.0}, "penalty is -1.0, but must be at least 0"),
        ({"penalty": math.inf}, "penalty is inf"),
        ({"method": "wgan"}, "method is 'wgan', but must be one of vaegan, vae, gan"),
        ({"method": "gan", "gamma": 0.1}, "gamma has no effect with objective.method=gan: leave it at its default"),
        ({"method": "vae", "penalty": 1.0}, "penalty has no effect with objective.method=vae"),
        ({"method": "gan", "judge_reconstructions": True}, "judge_reconstructions has no effect"),
        ({"beta": -1.0}, "beta is -1.0"),
        ({"binarize": "dynamic"}, "model.likelihood is a density on"),
    ],
)
def test_bad_objectives(fields, message):
    with pytest.raises(ValueError, match=message):
        vaegan.make_objective(small()[0], **fields)


def test_a_discriminator_takes_no_binary_images():
    """They would differ from the decoder's grey means in every pixel. The plain VAE of the same networks takes them."""
    model = vaegan.make(SHAPE, decoder_features=(4, 4), likelihood="bernoulli")
    for method in ("vaegan", "gan"):
        with pytest.raises(ValueError, match="data.binarize is 'threshold', but a discriminator"):
            vaegan.make_objective(model, "threshold", method=method)
    assert vaegan.make_objective(model, "threshold", method="vae")


def test_baselines_of_binary_pixels_are_those_of_what_the_model_sees():
    image = np.array([[0, 100], [255, 128]], np.uint8).reshape(2, 1, 2, 1)
    model = Model(lambda key: {})
    known = {"method": "vae", "likelihood": "bernoulli", "binarize": "threshold"}
    assert vaegan.baselines(model, image, **known) == vae.baselines(
        model, image, likelihood="bernoulli", binarize="threshold"
    )


def test_a_plain_gan_gets_no_verdict_on_an_encoder_that_it_does_not_train():
    numbers = {"test/kl": 0.0, "test/active_units": 0, "test/adversarial": 0.7}
    judged = {"test/discriminator_on_data": 0.6, "test/discriminator_on_samples": 0.4}
    assert verdict(numbers | judged, "test", {}) == {}
    won = {"test/discriminator_on_data": 0.999, "test/discriminator_on_samples": 0.001}
    assert verdict(numbers | won, "test", {})["verdict"].startswith("the discriminator wins")
    assert verdict(numbers | judged | {"test/feature_reconstruction": 1.0}, "test", {})["verdict"].startswith(
        "collapsed"
    )


@pytest.mark.parametrize("data,samples,wins", [(0.995, 0.005, True), (0.995, 0.02, False), (0.98, 0.001, False)])
def test_a_discriminator_that_wins_is_said_to(data, samples, wins):
    numbers = {"test/kl": 20.0, "test/kl_by_latent": [10.0, 10.0]}
    numbers |= {"test/discriminator_on_data": data, "test/discriminator_on_samples": samples}
    assert (discriminator_wins(numbers, "test") is not None) == wins
    found = verdict(numbers, "test", {})
    assert found["verdict"].startswith("the discriminator wins: D is 0.9950 on data") == wins
    assert ("optimizer.rate_multipliers" in found.get("what to change", "")) == wins


def test_sharpness_of_known_images():
    """The variance of the Laplacian: 0 for a flat image, (16 + 4) / 36 for one bright pixel; a blur lowers it."""
    flat, point = np.full((1, *SHAPE), 0.5, np.float32), np.zeros((1, *SHAPE), np.float32)
    point[0, 4, 4, 0] = 1
    assert sharpness(flat) == 0
    assert sharpness(point) == pytest.approx(20 / 36 - (0 / 36) ** 2)
    assert sharpness(np.concatenate([flat, point])) == pytest.approx(10 / 36)
    blurred = sum(np.roll(point, shift, (1, 2)) for shift in [(0, 0), (0, 1), (1, 0), (1, 1)]) / 4
    assert sharpness(blurred) < 0.5 * sharpness(point)


# All else works as for a VAE


def small_job(changes=None, drawn=False, **run):
    """Two epochs of five steps on the bundled digits."""
    config = config_file.get_config("smoke").to_dict() | {"epochs": 2, "batch_size": 256} | (changes or {})
    config["model"] |= {"encoder_features": (4, 4), "decoder_features": (4, 4), "discriminator_features": (4, 4)}
    config["optimizer"] |= {"ema_decay": 0.9, "rate_multipliers": (1.0, 0.5, 2.0)}
    config["run"] |= run
    job = session.build(config)
    return job if drawn else job._replace(figures=lambda *_: {}), config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    job, config = small_job(drawn=True, steps_per_call=2)
    return *run_job(job, config, tmp_path_factory.mktemp("run"), routed=True), config


@pytest.mark.slow
@pytest.mark.parametrize("calls", [1, 3])
def test_a_stopped_run_continues_bit_for_bit(finished, tmp_path, calls):
    """Parameters, the three Adams, the average and the log; calls end at the steps 2, 4, 5, 7, 9, 10."""
    job, config = small_job(steps_per_call=2)
    state, _ = run_job(job, config, tmp_path, stop_after(calls))
    assert int(state.step) < 10
    state, directory = run_job(job, config, tmp_path)
    assert_same_state(state, finished[0])
    assert without_time(directory.history) == without_time(finished[1].history)


@pytest.mark.slow
def test_what_a_run_logs_draws_and_sums_up(finished):
    state, directory, _ = finished
    rows = directory.history
    trained = {f"train/{name}" for name in ("grad_norm", *(f"grad_norm/{network}" for network in NETWORKS))}
    assert trained <= set(rows[0])
    shown = {"adversarial", "discriminator", "discriminator_on_data", "discriminator_on_samples"}
    assert {f"test/{name}" for name in shown | {"feature_reconstruction", "bound", "kl_by_latent"}} <= set(rows[-1])
    figures = {path.name for path in (directory.path / "figures").iterdir()}
    assert figures >= {f"{name}.png" for name in ("training", "reconstructions", "samples", "codes", "manifold")}
    summary = (directory.path / "summary.md").read_text()
    assert "| norm of the gradient | encoder | decoder | discriminator |" in summary
    lines = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in summary.splitlines()}
    for term, expected in ROUTING.items():
        if term != "penalty":  # this run has none
            assert tuple(int(cell != "0") for cell in lines[term]) == expected, term
    assert set(state.ema["params"]) == set(NETWORKS)


@pytest.mark.slow
def test_a_trained_model_encodes_samples_and_has_a_likelihood(finished):
    _, directory, config = finished
    model = vae_jax.load(str(directory.path))
    image = model.sample(3, seed=1)
    mean, logvar = model.encode(image)
    assert image.shape == model.reconstruct(image).shape == model.decode(mean).shape == (3, 28, 28, 1)
    assert mean.shape == logvar.shape == (3, 20)
    assert np.isfinite(model.log_likelihood(image, samples=4)).all()
    with pytest.raises(ValueError, match="a model of the family vaegan has no classes"):
        model.predict(image)
    numbers = commands.evaluate(str(directory.path), config, "latest", "test")
    last = directory.history[-1]
    for name in ("loss", "bound", "feature_reconstruction", "discriminator_on_samples"):
        assert numbers[f"test/{name}"] == pytest.approx(last[f"test/{name}"], rel=1e-5)
    full = commands.evaluate(str(directory.path), config, "latest", "test", full=True, samples=2, count=4)
    assert {"test/nll", "test/frechet_distance", "test/active_units", "verdict"} <= set(full)
    assert commands.sample(str(directory.path), config, "latest", 4, 0)
    assert commands.traverse(str(directory.path), config, "latest", "test", 3, None, None)
    assert commands.interpolate(str(directory.path), config, "latest", "test", 3, None, None)


@pytest.mark.slow
def test_a_discriminator_that_wins_at_once_is_reported(tmp_path, capsys):
    """Its rate is a thousand times the others': one line on stderr, and in the summary what to change."""
    job, config = small_job({"epochs": 4, "batch_size": 32})
    config["optimizer"] |= {"rate_multipliers": (1e-4, 1e-4, 4.0), "ema_decay": 0.0}
    job = session.build(config)._replace(figures=lambda *_: {})
    _, directory = run_job(job, config, tmp_path)
    told = [line for line in capsys.readouterr().err.splitlines() if "the discriminator wins" in line]
    assert len(told) == 1 and "lower its entry of optimizer.rate_multipliers" in told[0]
    assert "| verdict | the discriminator wins" in (directory.path / "summary.md").read_text()


# The comparison


def test_the_table_of_a_comparison():
    """Means with intervals over the seeds; a method without an encoder and a part that is not there leave their cells
    empty.
    """
    numbers = dict.fromkeys(comparison.COLUMNS, 1.0)
    few = {name: numbers[name] for name in ("frechet_distance", "precision", "recall", "coverage", "sharpness")}
    rows = [{"stage": "model", "method": "vaegan", "seed": seed, **numbers, "recall": 0.5 + seed} for seed in (0, 1)]
    rows += [{"stage": "model", "method": "gan", "seed": 0, **few}, {"stage": "floor", **few}]
    heading, vae_row, _, vaegan_row, gan_row, floor = comparison.table(rows)
    assert vae_row == ["VAE", *[""] * (len(heading) - 1)]
    assert vaegan_row[0] == "VAE/GAN" and vaegan_row[heading.index("recall")] == "1 ± 6.4"
    assert gan_row[heading.index("pixel error, nats")] == "" and gan_row[heading.index("precision")] == "1"
    assert floor[:2] == ["training images", "1"]


def test_the_methods_of_a_comparison_are_the_variants_of_the_config():
    for method in vaegan.METHODS:
        expected = config_file.get_config(method if method != "vaegan" else "default").to_dict()
        changed = config_file.get_config().to_dict()
        fields = comparison.METHODS[method]
        changed["objective"] |= {name.removeprefix("objective."): value for name, value in fields.items()}
        assert changed == expected and changed["objective"]["method"] == method


def test_half_the_squared_error_is_summed_over_an_image():
    assert comparison.half_squared(np.zeros((2, 3, 1)), np.full((2, 3, 1), 2.0)) == 6


def test_the_floor_of_a_comparison_is_that_of_real_images(tmp_path):
    """Digits are too few for the Frechet distance, which is left out with the reason."""
    dataset = data.load(name="digits")
    floor = comparison.Comparison(tmp_path, dataset, 360).floor()
    assert floor["frechet_distance"].startswith("left out: 360 real images are fewer than")
    assert floor["sharpness"] == pytest.approx(1, abs=0.1) and floor["coverage"] > 0.8
    assert comparison.table([{"stage": "floor", **floor}])[-1][1] == ""
    with pytest.raises(ValueError, match="but the pinned classifier reads"):
        comparison.Comparison(
            tmp_path, dataset._replace(splits={"train": Split(np.zeros((1, 8, 8, 1), np.uint8), None)}), 1
        )
