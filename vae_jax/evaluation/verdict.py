"""A verdict on a run: sentences derived from its numbers by fixed rules."""

from collections.abc import Mapping, Sequence
from typing import Any

WON = 0.99  # the discriminator has won if it gives more than this probability to the right answer
UNUSED = 0.01  # nats of KL; a latent with less carries no information
GAP = 0.05  # largest acceptable excess of the test bound over the training bound, relative to the latter
FLOOR = 0.9  # smallest credible ratio of a bound to the floor, which is that of other images
COPIES = 0.2  # largest acceptable share of generated images closer to training data than the closest 1 % of test images


def verdict(numbers: Mapping[str, Any], split: str, baselines: Mapping[str, float]) -> dict[str, str]:
    """{what: sentence} from the available numbers of a split: state, explained variance, latents, fit, copies, what to
    change.

    The state is one of "the discriminator wins", "impossible", "collapsed", "memorising", "few latents used", "undertrained" and
    "healthy".
    """
    if not trains_an_encoder(numbers, split):
        return dict(zip(("verdict", "what to change"), discriminator_wins(numbers, split) or ()))
    found = {}
    explained = describe_explained(numbers, split, baselines)
    if explained:
        found["explained"] = explained
    kl = kl_by_latent(numbers, split)
    if kl is not None:
        found["latents"] = describe_latents(kl)
    copies = numbers.get(f"{split}/nearest_training_distance/closer_than_1_percent")
    if isinstance(copies, float):
        found["copies"] = (
            f"{copies:.1%} of the generated images lie nearer to a training image than 99 % of the {split} images do"
        )
    state, change = judge(numbers, split, baselines)
    trained, tested = numbers.get("train/bound"), numbers.get(f"{split}/bound")
    if trained is not None and tested is not None and split != "train":
        gap = tested - trained
        found["fit"] = f"the bound is {tested:.2f} on {split} and {trained:.2f} in training, {gap:+.2f} nats"
        if state.startswith("healthy") and gap > GAP * abs(trained):
            state += f", but the bound on {split} is {gap:.2f} nats above that of training"
            change = "use more images, or fewer epochs"
    return {"verdict": state} | found | ({"what to change": change} if change else {})


def kl_by_latent(numbers: Mapping[str, Any], split: str) -> list[float] | None:
    """The KL of each latent; of several seeds that of the first, since their latents do not correspond."""
    name = f"{split}/kl_by_latent"
    return next((value for key, value in numbers.items() if key.startswith(f"{name}/seed")), numbers.get(name))


def trains_an_encoder(numbers: Mapping[str, Any], split: str) -> bool:
    """Whether an encoder is trained: a classifier and a regression have no latents, a plain GAN does not train its
    encoder.
    """
    has_latents = f"{split}/kl" in numbers and numbers.get(f"{split}/kl_by_latent") != []
    return has_latents and not is_plain_gan(numbers, split)


def is_plain_gan(numbers: Mapping[str, Any], split: str) -> bool:
    """Whether the numbers are those of a GAN that compares no reconstructions: nothing trains its encoder."""
    return f"{split}/adversarial" in numbers and f"{split}/feature_reconstruction" not in numbers


def discriminator_wins(numbers: Mapping[str, Any], split: str) -> tuple[str, str] | None:
    """The verdict that the discriminator wins, and what to change; None if it does not win."""
    data, samples = (numbers.get(f"{split}/discriminator_on_{what}") for what in ("data", "samples"))
    if data is None or samples is None or data <= WON or 1 - samples <= WON:
        return None
    return (
        f"the discriminator wins: D is {data:.4f} on data and {samples:.4f} on samples",
        "lower its entry of optimizer.rate_multipliers, raise objective.penalty, or give model.discriminator_features fewer channels",
    )


def judge(numbers: Mapping[str, Any], split: str, baselines: Mapping[str, float]) -> tuple[str, str]:
    """The state of a run with the numbers behind it, and what to change."""
    kl, loss = numbers.get(f"{split}/kl"), numbers.get(f"{split}/loss")
    by_latent = kl_by_latent(numbers, split)
    copies = numbers.get(f"{split}/nearest_training_distance/closer_than_1_percent", 0.0)
    collapsed, floor = (
        next((value for name, value in baselines.items() if name.startswith(kind)), None)
        for kind in ("collapsed", "floor")
    )
    active, bound = numbers.get(f"{split}/active_units"), numbers.get(f"{split}/bound")
    if won := discriminator_wins(numbers, split):
        return won
    if floor is not None and bound is not None and bound < FLOOR * floor:
        return (
            f"impossible: the bound {bound:.2f} is below {floor:.2f}, the floor of the training images",
            "look for images that differ from the training images, or for an error in the likelihood",
        )
    if active == 0 or (kl is not None and kl < UNUSED):
        known = collapsed is not None and loss is not None
        reached = f", and the loss is {loss:.2f}, compared with {collapsed:.2f} without latents" if known else ""
        return (
            f"collapsed: the latents carry {kl:.3g} nats{reached}",
            "lower objective.beta, warm up the KL or give it free bits where the family can, or train longer",
        )
    if isinstance(copies, float) and copies > COPIES:
        return (
            f"memorising: {copies:.0%} of the generated images are nearer to training than 99 % of the {split} images are",
            "use more images, a smaller network, or fewer epochs",
        )
    used = sum(value >= UNUSED for value in by_latent or [])
    if by_latent is not None and used < len(by_latent) / 2:
        return (
            f"few latents used: {used} of {len(by_latent)} carry more than {UNUSED} nats",
            f"lower model.latent_dim to {max(used, 1)}, which changes little, or lower objective.beta",
        )
    if collapsed is not None and loss is not None and min(loss, numbers.get("train/loss", loss)) > collapsed:
        return (
            f"undertrained: the loss {loss:.2f} is above {collapsed:.2f}, the loss of a model without latents",
            "train longer, or raise optimizer.learning_rate",
        )
    return f"healthy: the latents carry {kl:.1f} nats", ""


def describe_explained(numbers: Mapping[str, Any], split: str, baselines: Mapping[str, float]) -> str:
    """The explained variance of the reconstructions, and the loss compared with the baselines; "" if unknown."""
    share, loss = numbers.get(f"{split}/explained variance"), numbers.get(f"{split}/loss")
    if share is None or loss is None:
        return ""
    beside = ", ".join(f"{name} {value:.2f}" for name, value in baselines.items())
    said = f"{max(share, 0.0):.0%} of the variance of the {split} images (the mean training image explains 0%)"
    return said + (f"; the loss is {loss:.2f} there, and on the training images: {beside}" if beside else "")


def describe_latents(kl_by_latent: Sequence[float]) -> str:
    """The KL that the latents carry, the latents with the most, and the unused ones."""
    order = sorted(range(len(kl_by_latent)), key=lambda latent: -kl_by_latent[latent])
    used = [latent for latent in order if kl_by_latent[latent] >= UNUSED]
    if not used:
        return "none carries any"
    unused = ", ".join(f"z{latent}" for latent in range(len(kl_by_latent)) if latent not in used)
    most = ", ".join(f"z{latent} {kl_by_latent[latent]:.2f}" for latent in used[:3])
    text = f"{len(used)} of {len(kl_by_latent)} carry {sum(kl_by_latent):.2f} nats; most: {most}"
    return text + (f"; unused: {unused}" if unused else "")
