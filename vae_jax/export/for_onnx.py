"""Export a trained model's networks for ONNX runtimes from their description as layers (`nn.description`)."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from vae_jax.export.for_jax import check_agreement, programs_of
from vae_jax.nn.description import Layer
from vae_jax.pretrained import Pretrained

OPSET = 17
IR_VERSION = 8  # readable by runtimes since 2022
FUNCTIONS = {"relu": "Relu", "tanh": "Tanh", "sigmoid": "Sigmoid"}
TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]


def onnx_programs(pretrained: Pretrained) -> dict[str, bytes]:
    """{file: program} of the networks, for any batch, each checked in onnxruntime against the model in float32.

    Raises ValueError if onnx or onnxruntime is missing, if the model has no description as layers, or if a program
    differs from the model.
    """
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise ValueError(f"the format onnx needs {error.name}: pip install onnx onnxruntime") from None
    if pretrained.model.layers is None:
        raise ValueError("the format onnx needs a model's layers, which this one does not give: take the format jax")
    contents, programs = {}, programs_of(in_float32(pretrained))
    for name, layers in pretrained.model.layers(pretrained.variables).items():
        model = onnx_model(name, layers, programs[name].shapes[0], programs[name].output_shapes())
        onnx.checker.check_model(model, full_check=True)
        contents[f"{name}.onnx"] = model.SerializeToString(deterministic=True)
        session = onnxruntime.InferenceSession(contents[f"{name}.onnx"], providers=["CPUExecutionProvider"])
        (source,) = session.get_inputs()
        check_agreement(f"{name}.onnx", programs[name], lambda x, run=session.run, key=source.name: run(None, {key: x}))
    return contents


def in_float32(pretrained: Pretrained) -> Pretrained:
    """The same model, computing in float32 as ONNX runtimes do."""
    metadata, config = pretrained.metadata, pretrained.config
    exact = {name: "float32" for name in config["model"] if name == "precision"}
    return dataclasses.replace(pretrained, metadata=metadata | {"config": config | {"model": config["model"] | exact}})


def onnx_model(
    name: str, layers: Sequence[Layer], shape: tuple[int, ...], output_shapes: Sequence[tuple[int, ...]]
) -> Any:
    """The ONNX model of a network with input [batch, *shape]; images are channels-last, as in JAX."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = [], []

    def constant(values: Any) -> str:
        constants.append(numpy_helper.from_array(np.ascontiguousarray(values), f"constant{len(constants)}"))
        return constants[-1].name

    def node(kind: str, *inputs: str, outputs: Sequence[str] = (), **attributes: Any) -> str:
        outputs = list(outputs) or [f"{kind.lower()}{len(nodes)}"]
        nodes.append(helper.make_node(kind, list(inputs), outputs, **attributes))
        return outputs[0]

    source = "z" if name == "decoder" else "image"
    x = source
    for layer in layers:
        x = add_layer(node, constant, x, layer)
    if name == "encoder":
        ends = ["mean", "logvar"]
        node("Split", x, outputs=ends, axis=1)
    else:
        ends = [{"decoder": "image", "classifier": "probabilities"}[name]]
        node("Identity", x, outputs=ends)
    inputs, *outputs = (
        helper.make_tensor_value_info(end, TensorProto.FLOAT, ["batch", *sizes])
        for end, sizes in zip([source, *ends], [shape, *output_shapes])
    )
    graph = helper.make_graph(nodes, name, [inputs], outputs, constants)
    opsets = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="vae_jax")


def add_layer(node: Any, constant: Any, x: str, layer: Layer) -> str:
    """Append the nodes of a layer to a graph; returns the name of its output."""
    if layer.kind in FUNCTIONS:
        return node(FUNCTIONS[layer.kind], x)
    if layer.kind == "softmax":
        return node("Softmax", x, axis=-1)
    if layer.kind == "reshape":
        return node("Reshape", x, constant(np.array([-1, *layer.shape])))
    if layer.kind == "dense":
        return node("Gemm", x, *(constant(layer.weights[name]) for name in ("kernel", "bias")))
    if layer.kind == "affine":
        return node("Add", node("Mul", x, constant(layer.weights["factor"])), constant(layer.weights["offset"]))
    x = node("Transpose", x, perm=TO_CHANNELS_FIRST)
    if layer.kind == "max_pool":
        x = node("MaxPool", x, kernel_shape=[2, 2], strides=[2, 2])
    else:
        x = add_convolution(node, constant, x, layer)
    return node("Transpose", x, perm=TO_CHANNELS_LAST)


def add_convolution(node: Any, constant: Any, x: str, layer: Layer) -> str:
    """Append a convolution or a transposed one. ONNX defines the latter as a gradient, so its kernel is flipped."""
    kernel, bias = layer.weights["kernel"], constant(layer.weights["bias"])
    strides = [layer.stride] * 2
    if layer.kind == "conv":
        weights = constant(kernel.transpose(3, 2, 0, 1))
        return node("Conv", x, weights, bias, strides=strides, auto_pad="SAME_UPPER")
    weights = constant(kernel[::-1, ::-1].transpose(2, 3, 0, 1))
    total = [size - layer.stride for size in kernel.shape[:2]]
    low = [padding // 2 for padding in total]
    pads = [*low, *(padding - before for padding, before in zip(total, low))]
    return node("ConvTranspose", x, weights, bias, strides=strides, pads=pads)
