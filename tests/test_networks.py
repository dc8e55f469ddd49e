"""Tables 1, 2 and 4: layer shapes and parameter counts; equality with Flax's own layers; bad sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vae_jax import families, generate
from vae_jax.nn import bfloat16
from vae_jax.nn.layers import relu, rounded, window_extreme
from vae_jax.nn.networks import DenseEncoder


@pytest.fixture(scope="module")
def vae():
    model = families.vae.make((28, 28, 1))
    return model, jax.jit(model.init)(jax.random.key(0))


def layer_outputs(function, *arguments):
    """What the layers of a Linen `apply` returned, nested by name."""
    _, captured = function(*arguments, capture_intermediates=True)
    return captured["intermediates"]


def test_kernels_are_glorot_uniform_and_biases_zero(vae):
    for part in vae[1]["params"].values():
        for layer in part.values():
            kernel = layer["kernel"]
            fan_in, fan_out = (np.prod(kernel.shape[:-2]) * size for size in kernel.shape[-2:])
            limit = np.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * limit < np.abs(kernel).max() <= limit
            assert not layer["bias"].any()


def test_equals_flax_layers(vae):
    """The same parameters in `nn.Conv`, `nn.Dense` and `nn.ConvTranspose` give the same outputs."""
    model, variables = vae
    encoder, decoder = variables["params"]["encoder"], variables["params"]["decoder"]
    image = jnp.asarray(np.random.default_rng(0).random((2, 28, 28, 1), np.float32))

    def conv(features, name, x):
        return nn.Conv(features, (3, 3), (2, 2)).apply({"params": encoder[name]}, x)

    def conv_transpose(features, size, stride, name, x):
        return nn.ConvTranspose(features, (size, size), (stride, stride)).apply({"params": decoder[name]}, x)

    x = nn.relu(conv(64, "conv2", nn.relu(conv(32, "conv1", image))))
    mean, logvar = jnp.split(nn.Dense(40).apply({"params": encoder["fc"]}, x.reshape(2, -1)), 2, axis=-1)
    for ours, theirs in zip(model.encode(variables, image), (mean, logvar)):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    x = nn.relu(conv_transpose(64, 7, 7, "tconv1", mean[:, None, None, :]))
    x = nn.relu(conv_transpose(32, 3, 2, "tconv3", nn.relu(conv_transpose(64, 3, 2, "tconv2", x))))
    expected = conv_transpose(1, 3, 1, "tconv4", x)
    np.testing.assert_allclose(model.decode_raw(variables, mean), expected, atol=1e-5)
    image = generate.decode(model, variables, mean)
    np.testing.assert_allclose(image, nn.sigmoid(expected), atol=1e-5)


@pytest.mark.parametrize(
    "image_shape,features",
    [((32, 32, 3), (64, 32)), ((8, 12, 1), (16, 8)), ((6, 6, 3), (8,))],
)
def test_image_shape_comes_from_the_data(image_shape, features):
    model = families.vae.make(image_shape, latent_dim=5, decoder_features=features)
    image = jnp.zeros((2, *image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert [leaf.shape for leaf in jax.eval_shape(model.encode, variables, image)] == [(2, 5), (2, 5)]
    reconstruct = functools.partial(generate.reconstruct, model)
    assert jax.eval_shape(reconstruct, variables, image).shape == image.shape


@pytest.mark.parametrize(
    "image_shape,fields,message",
    [
        ((28, 28, 1), {"latent_dim": 0}, "latent_dim is 0"),
        ((28, 28, 1), {"encoder_features": (8, 0)}, "encoder_features"),
        ((28, 28, 1), {"decoder_features": (8, -1)}, "decoder_features"),
        ((30, 28, 1), {"decoder_features": (8, 8)}, "30x28 .* bring them to 32x28, or give"),
        ((45, 64, 3), {}, "45x64 .* bring them to 46x64"),
    ],
)
def test_bad_sizes(image_shape, fields, message):
    with pytest.raises(ValueError, match=message):
        families.vae.make(image_shape, **fields)


def test_relu_differentiates_as_jax_nn_relu():
    x = jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(jax.grad(lambda x: relu(x).sum())(x), jax.grad(lambda x: nn.relu(x).sum())(x))
    np.testing.assert_array_equal(jax.jvp(relu, (x,), (x,))[1], jax.jvp(nn.relu, (x,), (x,))[1])


# The post's Table 4: output shape and number of parameters; a pooled convolution's comes as 2x2 windows.
CLASSIFIER_LAYERS = {
    "conv1": ((14, 14, 4, 8), 80),
    "norm1": ((14, 14, 8), 16),
    "conv2": ((7, 7, 4, 16), 1168),
    "norm2": ((7, 7, 16), 32),
    "conv3": ((7, 7, 32), 4640),
    "norm3": ((7, 7, 32), 64),
    "fc": ((10,), 15_690),
}


def test_classifier_layer_shapes_and_parameter_counts():
    model = families.classifier.make((28, 28, 1), 10)
    image = jnp.zeros((3, 28, 28, 1))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    apply = functools.partial(model.apply, capture_intermediates=True)
    logits, captured = jax.eval_shape(apply, variables, image)
    assert logits.shape == (3, 10)
    assert set(variables["params"]) == set(CLASSIFIER_LAYERS)
    for name, (shape, count) in CLASSIFIER_LAYERS.items():
        assert captured["intermediates"][name]["__call__"][0].shape == (3, *shape)
        leaves = jax.tree.leaves(variables["params"][name])
        assert sum(leaf.size for leaf in leaves) == count
    leaves = jax.tree.leaves(variables["params"])
    assert sum(leaf.size for leaf in leaves) == 21_690


class FlaxClassifier(nn.Module):
    """Table 4 in Flax's own layers."""

    num_classes: int

    @nn.compact
    def __call__(self, x, train):
        for i, features in enumerate((8, 16, 32), start=1):
            x = nn.Conv(features, (3, 3), name=f"conv{i}")(x)
            x = nn.relu(nn.BatchNorm(not train, momentum=0.9, name=f"norm{i}")(x))
            x = nn.max_pool(x, (2, 2), (2, 2)) if i < 3 else x
        return nn.Dense(self.num_classes, name="fc")(x.reshape(x.shape[0], -1))


def randomised(variables, seed=0):
    """Scales of both signs, so that the pooled minimum is used too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: leaf + jnp.asarray(0.3 * rng.standard_normal(leaf.shape), leaf.dtype),
        variables,
    )


@pytest.mark.parametrize("image_shape,num_classes", [((28, 28, 1), 10), ((8, 12, 3), 2)])
def test_classifier_equals_flax_layers(image_shape, num_classes):
    """Logits, gradients and statistics, in training and in evaluation."""
    model = families.classifier.make(image_shape, num_classes)
    theirs = functools.partial(FlaxClassifier(num_classes).apply, mutable=["batch_stats"])
    rng = np.random.default_rng(1)
    image = jnp.asarray(rng.random((6, *image_shape), np.float32))
    variables = jax.jit(model.init)(jax.random.key(0))
    params = randomised(variables["params"])
    for i in (1, 2, 3):
        params[f"norm{i}"]["scale"] *= jnp.where(jnp.arange(8 * 2 ** (i - 1)) % 3, 1, -1)
    weight = jnp.asarray(rng.standard_normal((6, num_classes)), jnp.float32)

    def scalar(apply, train, params):
        stored = {"params": params, "batch_stats": variables["batch_stats"]}
        logits, state = apply(stored, image, train)
        return jnp.sum(weight * logits), (logits, state)

    for train in (True, False):
        results = [
            jax.jit(jax.grad(functools.partial(scalar, apply, train), has_aux=True))(params)
            for apply in (model.apply, theirs)
        ]
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4, rtol=3e-4),
            *results,
        )
        moved = results[0][1][1]["batch_stats"]["norm1"]["mean"]
        assert bool((moved != variables["batch_stats"]["norm1"]["mean"]).any()) == train


@pytest.mark.parametrize("image_shape,pooled", [((28, 28, 1), 7 * 7), ((32, 32, 3), 64), ((9, 31, 1), 2 * 7)])
def test_classifier_takes_its_sizes_from_the_data(image_shape, pooled):
    """Each pooling halves the size, and leaves out the last row or column of an odd one."""
    model = families.classifier.make(image_shape, 5, features=(4, 4, 6))
    image = jnp.zeros((2, *image_shape))
    variables = jax.eval_shape(model.init, jax.random.key(0))
    assert variables["params"]["fc"]["kernel"].shape == (pooled * 6, 5)
    assert jax.eval_shape(model.probabilities, variables, image).shape == (2, 5)


def test_windows_of_an_odd_size_hold_the_convolution_of_the_whole_image():
    """Before the first normalisation nothing but the last row and column is lost."""
    model = families.classifier.make((7, 9, 2), 3, features=(4, 5))
    image = jnp.asarray(np.random.default_rng(0).random((2, 7, 9, 2), np.float32))
    variables = jax.jit(model.init)(jax.random.key(0))
    windows = layer_outputs(model.apply, variables, image)["conv1"]["__call__"][0]
    conv = nn.Conv(4, (3, 3)).apply({"params": variables["params"]["conv1"]}, image)
    expected = conv[:, :6, :8].reshape(2, 3, 2, 4, 2, 4).swapaxes(2, 3)
    np.testing.assert_allclose(windows, expected.reshape(2, 3, 4, 4, 4), atol=1e-5)


def test_window_extreme_differentiates_as_max_and_min():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.integers(0, 3, (2, 3, 3, 4, 2)), jnp.float32)  # with ties
    largest = jnp.array([True, False])

    def plain(x):
        return jnp.stack([x[..., 0].max(axis=3), x[..., 1].min(axis=3)], axis=-1)

    def ours(x):
        return window_extreme(x, largest)

    np.testing.assert_array_equal(ours(x), plain(x))
    weight = jnp.asarray(rng.standard_normal((2, 3, 3, 2)), jnp.float32)
    gradients = [jax.vjp(f, x)[1](weight)[0] for f in (ours, plain)]
    np.testing.assert_allclose(*gradients, rtol=1e-6)
    tangents = [jax.jvp(f, (x,), (jnp.sin(x + x[::-1]),))[1] for f in (ours, plain)]
    np.testing.assert_allclose(*tangents, rtol=1e-6)


@pytest.mark.parametrize(
    "image_shape,num_classes,fields,message",
    [
        ((28, 28, 1), 0, {}, "at least 2 classes, but the data have 0"),
        ((28, 28, 1), 1, {}, "at least 2 classes, but the data have 1"),
        ((28, 28, 1), 10, {"features": (8, 0)}, "model.features is"),
        ((28, 28, 1), 10, {"features": ()}, "model.features is"),
        ((3, 28, 1), 10, {}, "images of 3x28 are below the 4x4 that 2 poolings need"),
    ],
)
def test_bad_classifier(image_shape, num_classes, fields, message):
    with pytest.raises(ValueError, match=message):
        families.classifier.make(image_shape, num_classes, **fields)


def test_pooling_halves_as_flax_layers_do():
    model = families.vae.make((28, 28, 1), encoder_features=(4, 6), pooling=True)
    image = jax.random.uniform(jax.random.key(0), (3, 28, 28, 1))
    variables = jax.jit(model.init)(jax.random.key(1))
    params, x = variables["params"]["encoder"], image
    for name, features in [("conv1", 4), ("conv2", 6)]:
        x = nn.Conv(features, (3, 3)).apply({"params": params[name]}, x)
        x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
    expected = nn.Dense(40).apply({"params": params["fc"]}, x.reshape(3, -1))
    found = model.encode(variables, image)
    np.testing.assert_allclose(jnp.concatenate(found, 1), expected, atol=1e-5)
    with pytest.raises(ValueError, match="below the 4x4 that 2 poolings need"):
        families.vae.make((2, 4, 1), encoder_features=(4, 4), decoder_features=(4,), pooling=True)


def logits(model, variables, image):
    return model.apply(variables, image)[0]


def test_a_cpu_rounds_to_bfloat16_and_keeps_float32():
    x = jnp.concatenate([jax.random.normal(jax.random.key(0), (1000,)), jnp.array([0, 1e-38, 3e38, jnp.inf])])
    found, slope = jax.value_and_grad(lambda x: rounded(x, jnp.bfloat16).sum())(x[:1000])
    np.testing.assert_array_equal(rounded(x, jnp.bfloat16), x.astype(jnp.bfloat16).astype(jnp.float32))
    assert rounded(x, jnp.bfloat16).dtype == found.dtype == jnp.float32
    np.testing.assert_array_equal(slope, 1)


def test_bfloat16_on_a_cpu_computes_what_it_does_on_accelerators(monkeypatch):
    """There the layers store bfloat16, too, so each of the six rounds its output."""
    vae = families.vae.make((28, 28, 1), precision="bfloat16")
    image = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1))
    variables = vae.init(jax.random.key(1))
    on_cpu = generate.reconstruct(vae, variables, image)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    np.testing.assert_allclose(generate.reconstruct(vae, variables, image), on_cpu, atol=0.002)


def test_a_dense_layer_multiplies_in_bfloat16_where_that_is_faster(monkeypatch):
    """So do its gradients; the output is that of float32 on rounded operands."""
    monkeypatch.setattr(bfloat16, "is_fast", lambda: True)
    image = rounded(jax.random.normal(jax.random.key(0), (10, 1, 1, 20)), jnp.bfloat16)
    exact, fast = (DenseEncoder(7, (), dtype) for dtype in (jnp.float32, jnp.bfloat16))
    params = jax.tree.map(lambda leaf: rounded(leaf, jnp.bfloat16), exact.init(jax.random.key(1), image))
    np.testing.assert_allclose(fast.apply(params, image), exact.apply(params, image), atol=1e-5)
    program = jax.jit(jax.grad(lambda arguments: jnp.sum(fast.apply(*arguments) ** 2))).lower((params, image))
    products = [line.split(" : ")[-1] for line in program.as_text().splitlines() if "dot_general" in line]
    assert len(products) == 4 and all(line.count("bf16") == 2 for line in products)  # one transposes


@pytest.mark.slow
@pytest.mark.parametrize(
    "make,output",
    [
        (families.vae.make, generate.reconstruct),
        (functools.partial(families.classifier.make, num_classes=10), logits),
    ],
    ids=["vae", "classifier"],
)
def test_bfloat16_is_close_and_leaves_parameters_float32(make, output):
    image = jax.random.uniform(jax.random.key(0), (4, 28, 28, 1))
    models = [make((28, 28, 1), precision=p) for p in ("float32", "bfloat16")]
    variables = jax.jit(models[0].init)(jax.random.key(1))

    def loss(model, params):
        return jnp.mean(output(model, variables | {"params": params}, image) ** 2)

    (exact, grads), (rough, rough_grads) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, model)))(variables["params"]) for model in models
    )
    assert rough.dtype == jnp.float32 and 0 < abs(rough - exact) < 0.01 * exact
    assert {leaf.dtype for leaf in jax.tree.leaves(rough_grads)} == {jnp.dtype("f4")}
    error = optax.tree.norm(optax.tree.sub(rough_grads, grads))
    assert error < 0.05 * optax.tree.norm(grads)
    # Forward mode: the derivative along the gradient is its squared norm.
    _, slope = jax.jit(lambda params, along: jax.jvp(functools.partial(loss, models[1]), (params,), (along,)))(
        variables["params"], grads
    )
    assert abs(slope - optax.tree.norm(grads) ** 2) < 0.05 * slope


def test_bad_precision():
    with pytest.raises(
        ValueError,
        match="model.precision is 'half', but must be one of float32, bfloat16",
    ):
        families.vae.make((28, 28, 1), precision="half")


def test_the_dense_networks_have_the_sizes_of_the_iwae_paper():
    """784-200-200-2x50 and back: the weights and biases, counted by hand."""
    model = families.vae.make((28, 28, 1), network="mlp", latent_dim=50)
    params = jax.eval_shape(model.init, jax.random.key(0))["params"]
    encoder = 784 * 200 + 200 + 200 * 200 + 200 + 200 * 100 + 100
    decoder = 50 * 200 + 200 + 200 * 200 + 200 + 200 * 784 + 784
    assert [sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params[name])) for name in ("encoder", "decoder")] == [
        encoder,
        decoder,
    ]
    hidden = jax.eval_shape(families.vae.make((28, 28, 1), network="mlp", hidden=(30, 20)).init, jax.random.key(0))[
        "params"
    ]
    assert hidden["encoder"]["fc1"]["kernel"].shape == (784, 30) and hidden["decoder"]["fc1"]["kernel"].shape == (
        20,
        20,
    )


def test_the_output_of_dense_networks_starts_at_the_mean_image():
    mean = np.linspace(0, 1, 64, dtype=np.float32).reshape(8, 8, 1)
    model = families.vae.make((8, 8, 1), network="mlp", hidden=(5,), likelihood="bernoulli")
    variables = model.init(jax.random.key(0), mean)
    without = jax.tree.map(jnp.zeros_like, variables["params"]["decoder"]["fc"]["kernel"])
    variables["params"]["decoder"]["fc"]["kernel"] = without
    found = model.likelihood.mean(variables, model.decode_raw(variables, jnp.ones((3, 20))))
    np.testing.assert_allclose(found, np.tile(np.clip(mean, 0.001, 0.999), (3, 1, 1, 1)), rtol=1e-4)


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"network": "resnet"}, "model.network is 'resnet', but must be one of conv, mlp"),
        ({"network": "mlp", "hidden": ()}, "model.hidden is \\(\\), but must be at least 1"),
        ({"network": "mlp", "pooling": True}, "model.pooling is True, but the network mlp has none: leave it at False"),
        ({"scale": 2.0}, "model.scale is 2.0, but the likelihood unit_gaussian has none: leave it at 1.0"),
        ({"components": 3}, "model.components is 3, but the prior standard_normal has none: leave it at 100"),
        ({"prior": "mixture", "components": 0}, "model.components is 0, but must be at least 1"),
        ({"likelihood": "gaussian", "scale": 0.0}, "model.scale is 0.0, but must be above 0"),
    ],
)
def test_fields_that_mean_nothing_are_refused(fields, message):
    with pytest.raises(ValueError, match=message) as error:
        families.vae.make((8, 8, 1), **fields)
    assert "\n" not in str(error.value)
