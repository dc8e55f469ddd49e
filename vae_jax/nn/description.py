"""Networks as data: lists of layers with their weights, for any runtime.

Images and feature maps are [batch, height, width, channel].
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import flax.linen as nn
import numpy as np

from vae_jax.nn.layers import BatchNormMaxPool
from vae_jax.nn.networks import Autoencoder, Classifier, Decoder, DenseDecoder, DenseEncoder, Encoder


class Layer(NamedTuple):
    """One layer of a network.

    Attributes:
        kind: "conv" and "conv_transpose" (SAME with the given stride, kernel [height, width, in, out], not flipped, and
            bias), "dense" (kernel [in, out] and bias), "affine" (x factor + offset per channel), "max_pool" (2x2,
            without the last row or column of an odd size), "reshape" (to [batch, *shape]), "softmax" (over the last
            axis), or an elementwise function: "relu", "tanh", "sigmoid".
    """

    kind: str
    weights: Mapping[str, np.ndarray] = MappingProxyType({})
    stride: int = 1
    shape: tuple[int, ...] = ()


def describe(network: nn.Module, params: Mapping[str, Any], state: Mapping[str, Any] | None = None) -> list[Layer]:
    """The layers of a network with these parameters and running statistics. Raises ValueError for unsupported networks."""
    known: dict[type, Callable[..., list[Layer]]] = {
        Encoder: describe_encoder,
        Decoder: describe_decoder,
        DenseEncoder: describe_dense,
        DenseDecoder: describe_dense,
        Classifier: describe_classifier,
    }
    if type(network) not in known:
        raise ValueError(f"a {type(network).__name__} has no description as layers")
    as_arrays = {name: {key: np.asarray(leaf) for key, leaf in part.items()} for name, part in params.items()}
    return known[type(network)](network, as_arrays, state or {})


def describe_autoencoder(network: nn.Module, variables: Mapping[str, Any]) -> dict[str, list[Layer]]:
    """encoder: image -> mean and logvar of q(z | x), concatenated; decoder: z -> sigmoid of its output, the mean image.

    Raises ValueError for networks other than those of `nn.networks`.
    """
    if not isinstance(network, Autoencoder):
        raise ValueError(f"a {type(network).__name__} has no description as layers")  # noqa: TRY004
    params = variables["params"]
    return {
        "encoder": describe(network.encoder, params["encoder"]),
        "decoder": [*describe(network.decoder, params["decoder"]), Layer("sigmoid")],
    }


def describe_encoder(network: Encoder, params: Mapping[str, Any], state: Mapping[str, Any]) -> list[Layer]:
    """The post's encoder, with strides or with pooling."""
    layers = []
    for name in numbered("conv", params):
        layers.append(Layer("conv", params[name], stride=1 if network.pooling else 2))
        layers += [Layer("max_pool")] * network.pooling + [Layer("relu")]
    return [*layers, flatten(params["fc"]), Layer("dense", params["fc"])]


def describe_decoder(network: Decoder, params: Mapping[str, Any], state: Mapping[str, Any]) -> list[Layer]:
    """The post's decoder; its first layer becomes a dense layer."""
    first, *others = numbered("tconv", params)
    kernel, bias = params[first]["kernel"], params[first]["bias"]
    height, width, latents, features = kernel.shape
    dense = {
        "kernel": kernel[::-1, ::-1].transpose(2, 0, 1, 3).reshape(latents, -1),
        "bias": np.tile(bias, height * width),
    }
    layers = [Layer("dense", dense), Layer("reshape", shape=(height, width, features))]
    for name in others:
        layers += [Layer("relu"), Layer("conv_transpose", params[name], stride=1 if name == others[-1] else 2)]
    return layers


def describe_dense(
    network: DenseEncoder | DenseDecoder, params: Mapping[str, Any], state: Mapping[str, Any]
) -> list[Layer]:
    """Dense layers with tanh, of an encoder or a decoder."""
    hidden = [layer for name in numbered("fc", params) for layer in (Layer("dense", params[name]), Layer("tanh"))]
    ends = [flatten(params["fc1"] if "fc1" in params else params["fc"])] if isinstance(network, DenseEncoder) else []
    shape = [Layer("reshape", shape=tuple(network.output_shape))] if isinstance(network, DenseDecoder) else []
    return [*ends, *hidden, Layer("dense", params["fc"]), *shape]


def describe_classifier(network: Classifier, params: Mapping[str, Any], state: Mapping[str, Any]) -> list[Layer]:
    """The post's classifier: normalisation with the running statistics, before pooling as in the post."""
    layers, convolutions = [], numbered("conv", params)
    for i, name in enumerate(convolutions, start=1):
        norm, running = params[f"norm{i}"], state[f"norm{i}"]
        factor = norm["scale"] / np.sqrt(np.asarray(running["var"]) + np.float32(BatchNormMaxPool.epsilon))
        offset = norm["bias"] - np.asarray(running["mean"]) * factor
        layers += [Layer("conv", params[name]), Layer("affine", {"factor": factor, "offset": offset})]
        layers += [Layer("max_pool")] * (i < len(convolutions)) + [Layer("relu")]
    return [*layers, flatten(params["fc"]), Layer("dense", params["fc"]), Layer("softmax")]


def numbered(prefix: str, params: Mapping[str, Any]) -> list[str]:
    """The layer names PREFIX1, PREFIX2, ..., in this order."""
    return [f"{prefix}{i}" for i in range(1, len(params) + 1) if f"{prefix}{i}" in params]


def flatten(dense: Mapping[str, np.ndarray]) -> Layer:
    """The reshape that flattens feature maps for this dense layer."""
    return Layer("reshape", shape=(dense["kernel"].shape[0],))
