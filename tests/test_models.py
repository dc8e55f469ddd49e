"""Tables 1 and 2: layer shapes and parameter counts; equality with Flax's own layers; bad sizes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vae_jax.models import make_vae, relu


@pytest.fixture(scope="module")
def vae():
    network = make_vae((28, 28, 1))
    return network, jax.jit(network.init)(jax.random.key(0), jnp.zeros((1, 28, 28, 1)))


# The post's Tables 1 and 2: output shape and number of parameters of each layer.
LAYERS = {
    "encoder/conv1": ((14, 14, 32), 320),
    "encoder/conv2": ((7, 7, 64), 18_496),
    "encoder/fc": ((40,), 125_480),
    "decoder/tconv1": ((7, 7, 64), 62_784),
    "decoder/tconv2": ((14, 14, 64), 36_928),
    "decoder/tconv3": ((28, 28, 32), 18_464),
    "decoder/tconv4": ((28, 28, 1), 289),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_layer_shapes_and_parameter_counts(vae, layer):
    network, variables = vae
    part, name = layer.split("/")
    _, captured = network.apply(
        variables, jnp.zeros((3, 28, 28, 1)), capture_intermediates=True
    )
    shape, count = LAYERS[layer]
    assert captured["intermediates"][part][name]["__call__"][0].shape == (3, *shape)
    assert (
        sum(leaf.size for leaf in jax.tree.leaves(variables["params"][part][name]))
        == count
    )


@pytest.mark.parametrize("part,count", [("encoder", 144_296), ("decoder", 118_465)])
def test_parameter_counts(vae, part, count):
    assert sum(leaf.size for leaf in jax.tree.leaves(vae[1]["params"][part])) == count


def test_kernels_are_glorot_uniform_and_biases_zero(vae):
    for part in vae[1]["params"].values():
        for layer in part.values():
            kernel = layer["kernel"]
            fan_in, fan_out = (
                np.prod(kernel.shape[:-2]) * size for size in kernel.shape[-2:]
            )
            limit = np.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * limit < np.abs(kernel).max() <= limit
            assert not layer["bias"].any()


def test_equals_flax_layers(vae):
    """The same parameters in `nn.Conv`, `nn.Dense` and `nn.ConvTranspose` give the same outputs."""
    network, variables = vae
    encoder, decoder = variables["params"]["encoder"], variables["params"]["decoder"]
    image = jnp.asarray(np.random.default_rng(0).random((2, 28, 28, 1), np.float32))

    def conv(features, name, x):
        return nn.Conv(features, (3, 3), (2, 2)).apply({"params": encoder[name]}, x)

    def conv_transpose(features, size, stride, name, x):
        return nn.ConvTranspose(features, (size, size), (stride, stride)).apply(
            {"params": decoder[name]}, x
        )

    x = nn.relu(conv(64, "conv2", nn.relu(conv(32, "conv1", image))))
    mean, logvar = jnp.split(
        nn.Dense(40).apply({"params": encoder["fc"]}, x.reshape(2, -1)), 2, axis=-1
    )
    for ours, theirs in zip(
        network.apply(variables, image, method="encode"), (mean, logvar)
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)

    x = nn.relu(conv_transpose(64, 7, 7, "tconv1", mean[:, None, None, :]))
    x = nn.relu(
        conv_transpose(
            32, 3, 2, "tconv3", nn.relu(conv_transpose(64, 3, 2, "tconv2", x))
        )
    )
    expected = nn.sigmoid(conv_transpose(1, 3, 1, "tconv4", x))
    np.testing.assert_allclose(
        network.apply(variables, mean, method="decode"), expected, atol=1e-5
    )


@pytest.mark.parametrize(
    "image_shape,features",
    [((32, 32, 3), (64, 32)), ((8, 12, 1), (16, 8)), ((6, 6, 3), (8,))],
)
def test_image_shape_comes_from_the_data(image_shape, features):
    network = make_vae(image_shape, latent_dim=5, decoder_features=features)
    image = jnp.zeros((2, *image_shape))
    variables = network.init(jax.random.key(0), image)
    assert network.apply(variables, image).shape == image.shape
    assert network.apply(variables, image, method="encode")[0].shape == (2, 5)


@pytest.mark.parametrize(
    "image_shape,fields,message",
    [
        ((28, 28, 1), {"latent_dim": 0}, "latent_dim is 0"),
        ((28, 28, 1), {"encoder_features": (8, 0)}, "encoder_features"),
        ((28, 28, 1), {"decoder_features": ()}, "decoder_features"),
        ((30, 28, 1), {}, "30x28 .* pad them to 32x28"),
    ],
)
def test_bad_sizes(image_shape, fields, message):
    with pytest.raises(ValueError, match=message):
        make_vae(image_shape, **fields)


def test_relu_differentiates_as_jax_nn_relu():
    x = jnp.array([-1.0, 0.0, 2.0])
    np.testing.assert_array_equal(
        jax.grad(lambda x: relu(x).sum())(x), jax.grad(lambda x: nn.relu(x).sum())(x)
    )
    np.testing.assert_array_equal(
        jax.jvp(relu, (x,), (x,))[1], jax.jvp(nn.relu, (x,), (x,))[1]
    )
