"""M1 + M2 (Kingma et al. 2014): a VAE, M1, and the semi-supervised model M2 on its codes.

    p(x, c, y, z) = p(x | c) p(c | y, z) p(y) p(z),    q(c, y, z | x) = q(c | x) q(y | c) q(z | c, y)
    p(c | y, z) = N(m(y, z), diag(v(y, z)))
    loss = E_q(c | x)[-log p(x | c)] + beta KL(q(c | x) || N(0, I))    M1
         + E_q(c | x)[L(c, y) + alpha' CE(y, q(y | c)), or U(c)]       M2; the codes c are its data

alpha' is alpha / (share of labelled images in a batch).

Both train at the same time. The gradient of M2 stops at the codes, so M1 is the VAE of families/vae.py, unless
`optimizer.clip_norm` clips the gradients of both together. M2 trains as it would on the codes of a finished M1, except
that the codes change at first. Together they are one model, with M2 as the prior of the codes:

    bound = E_q(c | x)[-log p(x | c) + log q(c | x) + U(c)]  >=  -log p(x)
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from vae_jax.batch import named_key
from vae_jax.families import Metric, labels, semisupervised, vae
from vae_jax.families.conditional import make_figures, needs_condition  # noqa: F401
from vae_jax.families.labels import baselines, check_classes, check_data, of_labelled  # noqa: F401
from vae_jax.families.reports import ledger, make_probes  # noqa: F401
from vae_jax.likelihoods import HALF_LOG_2PI, Likelihood, align
from vae_jax.model import ABSENT, Model
from vae_jax.nn.networks import PRECISIONS, Autoencoder, DenseDecoder, DenseEncoder, check_sizes
from vae_jax.objectives import reparameterize
from vae_jax.priors import Prior, log_normal

NAME = "Stacked semi-supervised VAE (M1 + M2)"
TERMS = ("reconstruction", "kl", "code_bound", "cross_entropy")
METRICS = {name: metric for name, metric in labels.METRICS.items() if name != "kl_by_latent"} | {
    "loss": Metric("loss of M1 plus that of M2", "nats", "lower"),
    "code_bound": Metric("U(c), the bound of M2 on -log p(c)", "nats", "lower"),
    "label_entropy": Metric("entropy of q(y | c)", "nats"),
}


def make(
    image_shape: tuple[int, int, int],
    num_classes: int,
    *,
    latent_dim: int = 20,
    network: str = "conv",
    encoder_features: tuple[int, ...] = (),
    decoder_features: tuple[int, ...] = (),
    hidden: tuple[int, ...] = (200, 200),
    likelihood: str = "unit_gaussian",
    scale: float = 1.0,
    code_latent_dim: int = 50,
    code_hidden: tuple[int, ...] = (500,),
    precision: str = "float32",
) -> Model:
    """M1 is the family vae, with the same fields; M2 has dense layers with tanh.

    Args:
        latent_dim: size of the codes c.
        code_latent_dim: size of M2's z.
        code_hidden: widths of M2's layers.

    Raises ValueError as the family vae does, and for data with fewer than 2 classes.
    """
    check_sizes(code_latent_dim=(code_latent_dim,), code_hidden=code_hidden)
    m1 = vae.make(
        image_shape,
        latent_dim=latent_dim,
        network=network,
        encoder_features=encoder_features,
        decoder_features=decoder_features,
        hidden=hidden,
        likelihood=likelihood,
        scale=scale,
        precision=precision,
    )
    check_classes(num_classes)
    code_shape = (1, 1, latent_dim)
    of_codes = tuple(code_hidden), PRECISIONS[precision]
    networks = Autoencoder(
        DenseEncoder(2 * code_latent_dim, *of_codes), DenseDecoder((1, 1, 2 * latent_dim), *of_codes)
    )
    m2 = semisupervised.infer_label(networks, code_latent_dim, density_of_codes(), code_shape, num_classes)
    return stack(m1, m2)


def stack(m1: Model, m2: Model) -> Model:
    """One model of images and labels, with M2 as the prior of the codes."""

    def init(key, pixel_mean=None):
        of_m1, of_m2 = jax.random.split(key)
        variables = m1.init(of_m1, pixel_mean)
        return variables | {"params": {**variables["params"], "codes": m2.init(of_m2)["params"]}}

    def given(y) -> Model:
        net = m2.given(y)

        def sample(variables, key, count):
            of_z, of_code = jax.random.split(key)
            own = of_codes(variables)
            raw = net.decode_raw(own, net.prior.sample(own, of_z, count))
            return net.likelihood.sample(own, of_code, raw).reshape(count, m1.latent_dim)

        return model._replace(prior=model.prior._replace(sample=sample), given=ABSENT)

    model = m1._replace(
        init=init,
        prior=Prior(init=lambda key: {}, log_prob=ABSENT, sample=needs_condition),
        probabilities=lambda variables, image: m2.probabilities(
            of_codes(variables), as_image(m1.encode(variables, image)[0])
        ),
        num_classes=m2.num_classes,
        condition_on="label",
        condition=m2.condition,
        given=given,
        layers=ABSENT,
        apply=(m1, m2),
    )
    return model


def of_codes(variables: dict) -> dict:
    """The variables of M2."""
    return {"params": variables["params"]["codes"]}


def as_image(code: Float[Array, "batch latent"]) -> Float[Array, "batch 1 1 latent"]:
    """Codes in the shape of M2's data, an image of one pixel."""
    return code[:, None, None]


def density_of_codes() -> Likelihood:
    """N(c; m, diag(v)); the raw decoder output is m and ln v, concatenated."""

    def energy(variables, raw, code):
        mean, logvar = jnp.split(raw, 2, axis=-1)
        return 0.5 * ((align(code, mean) - mean) ** 2 * jnp.exp(-logvar) + logvar)

    def sample(variables, key, raw):
        mean, logvar = jnp.split(raw, 2, axis=-1)
        return mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)

    return Likelihood("density of the codes", energy, sample, constant=HALF_LOG_2PI, channels=2)


def make_objective(
    model: Model,
    labelled_share: float,
    binarize: str = "none",
    *,
    beta: float = 1.0,
    warmup_steps: int = 0,
    alpha: float = 0.1,
    label_warmup_steps: int = 0,
):
    """The sum of the losses of M1 and M2; fields as in the families vae (for M1: beta, warmup_steps) and
    semisupervised.

    Training classifies a draw from q(c | x); evaluation, like `probabilities`, classifies its mean.
    """
    m1, m2 = model.apply
    of_image = vae.make_objective(m1, binarize, beta=beta, warmup_steps=warmup_steps)
    of_code = semisupervised.make_objective(m2, labelled_share, alpha=alpha, label_warmup_steps=label_warmup_steps)

    def objective(variables, batch, keys, train, step, axis_name=None):
        image, model_state = of_image(variables, batch, keys, train, step, axis_name)
        mean, logvar = m1.encode(variables, batch.image)
        drawn = reparameterize(mean, logvar, keys)[0]  # the z that `of_image` decodes
        data = batch._replace(image=as_image(lax.stop_gradient(drawn)))
        code, _ = of_code(of_codes(variables), data, named_key(keys, "codes"), train, step)
        metrics = {name: code[name] for name in ("label_entropy", "cross_entropy", "accuracy")}
        if not train:
            metrics |= of_labelled(m2.apply(of_codes(variables), as_image(mean)), batch.label)
        metrics["code_bound"] = code["bound"] + model.latent_dim * HALF_LOG_2PI
        metrics["bound"] = image["reconstruction"] + log_normal(drawn, mean, logvar) + metrics["code_bound"]
        return image | metrics | {"loss": image["loss"] + code["loss"]}, model_state

    return objective


def decodes_per_example() -> int:
    """One image; M2 decodes codes, which are small."""
    return 1


def make_final_probes(model: Model, samples: int, binarize: str) -> None:
    """None: p(c | y) has no closed form, so importance samples of c alone give no likelihood."""
