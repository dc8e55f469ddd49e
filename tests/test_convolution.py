"""convolution.py against lax: values, gradients, forward mode, second order, vmap; odd sizes too."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from vae_jax.nn import bfloat16, convolution
from vae_jax.run.devices import WITHOUT_YNNPACK


def lax_conv(x, kernel, stride):
    return lax.conv_general_dilated(x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def lax_conv_transpose(x, kernel, stride):
    return lax.conv_transpose(x, kernel, (stride, stride), "SAME")


PAIRS = [(convolution.conv, lax_conv), (convolution.conv_transpose, lax_conv_transpose)]
# (height, width, kernel, stride): the post's layers, then odd sizes, even kernels, strides above the kernel.
GEOMETRIES = [
    (28, 28, 3, 1),
    (14, 14, 3, 2),
    (7, 7, 3, 2),
    (5, 8, 3, 2),
    (6, 5, 3, 1),
    (6, 6, 4, 2),
    (5, 4, 2, 3),
    (4, 6, 5, 2),
    (3, 2, 1, 2),
]


def operands(height, width, kernel, batch=2, c_in=3, c_out=4):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, height, width, c_in), np.float32)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((kernel, kernel, c_in, c_out), np.float32))


def assert_close(a, b):
    def check(a, b):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(np.abs(b).max()))

    jax.tree.map(check, a, b)


@pytest.mark.parametrize("ours,theirs", PAIRS, ids=["conv", "conv_transpose"])
@pytest.mark.parametrize("height,width,kernel,stride", GEOMETRIES)
def test_values_and_gradients_equal_lax(ours, theirs, height, width, kernel, stride):
    x, w = operands(height, width, kernel)

    def derivatives(f):
        @jax.jit
        def run(x, w):
            out, pullback = jax.vjp(lambda x, w: f(x, w, stride), x, w)
            cotangent = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape)
            return out, pullback(cotangent)

        return run(x, w)

    assert_close(derivatives(ours), derivatives(theirs))


@pytest.mark.parametrize("ours,theirs", PAIRS, ids=["conv", "conv_transpose"])
def test_forward_mode_and_second_order_equal_lax(ours, theirs):
    x, w = operands(5, 6, 3)
    tangents = jnp.sin(x), jnp.cos(w)

    def forward(f):
        return jax.jit(functools.partial(jax.jvp, lambda x, w: f(x, w, 2)))((x, w), tangents)

    assert_close(forward(ours), forward(theirs))

    def curvature(f):
        gradient = jax.grad(lambda x, w: jnp.mean(f(x, w, 2) ** 3), (0, 1))
        return jax.jit(functools.partial(jax.jvp, gradient))((x, w), tangents)[1]

    assert_close(curvature(ours), curvature(theirs))


@pytest.mark.parametrize("ours,theirs", PAIRS, ids=["conv", "conv_transpose"])
@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_vmap_equals_lax(ours, theirs, axes):
    x, w = operands(4, 6, 3)
    x = jnp.stack([x, 2 * x]) if axes[0] == 0 else x
    w = jnp.stack([w, 3 * w, 1 - w][:2]) if axes[1] == 0 else w

    def per_seed(f):
        return jax.jit(jax.vmap(jax.value_and_grad(lambda x, w: jnp.mean(f(x, w, 2) ** 2), (0, 1)), axes))(x, w)

    assert_close(per_seed(ours), per_seed(theirs))


@pytest.mark.parametrize("function", [convolution.conv, convolution.conv_transpose])
def test_vmap_over_images_of_one_kernel_is_one_larger_batch(function):
    """Ten labels tried for each image are ten times the images, and not ten products; nor is the kernel's gradient."""
    x, w = operands(4, 6, 3)
    gradient = jax.grad(lambda x, w: jnp.sum(jax.vmap(lambda x: function(x, w, 2))(x) ** 2), (0, 1))
    found = [
        eqn for eqn in jax.make_jaxpr(gradient)(jnp.stack([x] * 10), w).eqns if eqn.primitive.name.startswith("conv")
    ]
    assert len(found) == 3 and {len(eqn.invars[0].aval.shape) for eqn in found} == {4}
    assert all(eqn.invars[0].aval.shape[0] == 10 * len(x) for eqn in found)


@pytest.mark.parametrize("channels", [3, convolution.FEW_CHANNELS + 1])
@pytest.mark.parametrize("function", [convolution.conv, convolution.conv_transpose])
def test_forms_by_platform(function, channels):
    """Products on the CPU, convolutions on TPUs; on NVIDIA GPUs products where the large side has few channels."""
    x, w = operands(4, 4, 3, c_in=channels, c_out=channels)
    gradient = jax.jit(jax.grad(lambda x, w: jnp.sum(function(x, w, 2) ** 2), (0, 1)))
    lowered = {p: gradient.trace(x, w).lower(lowering_platforms=(p,)).as_text() for p in ("cpu", "cuda", "tpu")}
    found = {p: "stablehlo.convolution" in text for p, text in lowered.items()}
    many = channels > convolution.FEW_CHANNELS
    assert found == {"cpu": False, "cuda": many, "tpu": True}


@pytest.mark.parametrize(
    "width,stride,channels,taken_together",
    [(28, 1, 8, 4), (28, 1, 32, 2), (28, 1, 33, 1), (7, 1, 8, 1), (28, 2, 8, 2)],
)
def test_narrow_products_take_neighbours_together(width, stride, channels, taken_together):
    x, w = operands(3, width * stride, 3, c_out=channels)
    geometry = convolution.Geometry((3, 3), (stride, stride), (0, 0), (3 // stride, width), (3, width * stride))
    assert convolution._widen(geometry, channels)[1] == taken_together
    products, lax_form = (jax.jit(f, static_argnums=2) for f in (convolution._conv, convolution._lax_conv))
    assert_close(products(x, w, geometry), lax_form(x, w, geometry))


@pytest.mark.parametrize("ours,theirs", PAIRS)
def test_bfloat16_accumulates_in_float32(ours, theirs):
    """The error is one rounding of operands and result, however many terms are added."""
    x, w = operands(14, 14, 3, c_in=64)
    exact = theirs(x, w, 2)
    ours = ours(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), 2)
    assert ours.dtype == jnp.bfloat16
    error = jnp.abs(ours.astype(jnp.float32) - exact).max() / jnp.abs(exact).max()
    assert 0 < error < 0.01


is_fast = pytest.mark.skipif(not bfloat16.is_fast(), reason="this processor does not multiply bfloat16 faster")


@pytest.fixture
def fast_bfloat16(monkeypatch):
    """A processor that multiplies bfloat16 faster, whichever runs the test."""
    monkeypatch.setattr(bfloat16, "is_fast", lambda: True)


@pytest.mark.parametrize(
    "vendor,flags,fast",
    [
        ("GenuineIntel", "avx512f avx512_bf16 amx_bf16", True),
        ("GenuineIntel", "avx512f avx512_bf16", False),
        ("AuthenticAMD", "avx512f avx512_bf16", True),
        ("AuthenticAMD", "avx2", False),
        (None, None, False),
    ],
)
def test_which_processors_multiply_bfloat16_faster(monkeypatch, tmp_path, vendor, flags, fast):
    info = tmp_path / "cpuinfo"
    if vendor:
        info.write_text(f"vendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    monkeypatch.setattr(bfloat16, "CPU_INFO", info)
    assert bfloat16.is_fast.__wrapped__() == fast


def on_bfloat16(x):
    return x.astype(jnp.bfloat16).astype(jnp.float32)


@pytest.mark.parametrize("ours", [convolution.conv, convolution.conv_transpose])
@pytest.mark.parametrize("height,width,kernel,stride", GEOMETRIES[::2])
@pytest.mark.parametrize("options", [WITHOUT_YNNPACK, pytest.param({}, marks=is_fast)], ids=["evaluation", "training"])
def test_products_in_bfloat16_lose_nothing(fast_bfloat16, ours, height, width, kernel, stride, options):
    """Of numbers that are rounded already they are float32's, with all derivatives, also vmapped."""
    x, w = map(on_bfloat16, operands(height, width, kernel))

    def derivatives(x, w, dtype):
        out, pullback = jax.vjp(lambda x, w: ours(x, w, stride, dtype), x, w)
        return out, pullback(on_bfloat16(jnp.cos(jnp.arange(out.size, dtype=jnp.float32))).reshape(out.shape))

    def run(dtype):
        one = functools.partial(derivatives, dtype=dtype)
        both = jax.jit(
            lambda x, w: (one(x, w), jax.vmap(one)(jnp.stack([x, x]), jnp.stack([w, -w]))), compiler_options=options
        )
        return both(x, w)

    assert_close(run(jnp.bfloat16), run(jnp.float32))


@pytest.mark.parametrize(
    "dtype,fast,channels,faster",
    [
        (jnp.bfloat16, True, 2, True),
        (jnp.bfloat16, True, 1, False),
        (jnp.bfloat16, False, 2, False),
        (jnp.float32, True, 2, False),
    ],
)
def test_products_are_in_bfloat16_only_where_that_is_faster(monkeypatch, dtype, fast, channels, faster):
    monkeypatch.setattr(bfloat16, "is_fast", lambda: fast)
    x, w = operands(5, 8, 3, c_in=channels)
    program = jax.jit(lambda x, w: convolution.conv(x, w, 2, dtype)).lower(x, w).as_text()
    assert ("bf16" in program) == faster


def test_lax_forms_equal_the_products():
    x, w = operands(5, 8, 3)
    geometry = convolution.Geometry(size=(3, 3), stride=(2, 2), low=(1, 0), small=(3, 4), large=(5, 8))
    g = convolution._conv(x, w, geometry)
    assert_close(g, convolution._lax_conv(x, w, geometry))
    assert_close(convolution._input_grad(g, w, geometry), convolution._lax_input_grad(g, w, geometry))
    assert_close(
        convolution._kernel_grad(x, g, geometry),
        convolution._lax_kernel_grad(x, g, geometry),
    )
