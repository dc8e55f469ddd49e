"""Which term of a loss trains which network."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Key

from vae_jax.batch import Batch
from vae_jax.objectives import Objective
from vae_jax.steps import total


def networks(params: Mapping[str, Any]) -> dict[str, Any]:
    """{network: its parameters}: the top-level entries of the parameters, with an "autoencoder" split into its parts."""
    rest = {name: part for name, part in params.items() if name != "autoencoder"}
    return {**params.get("autoencoder", {}), **rest}


def gradient_routing(
    objective: Objective, variables: Mapping[str, Any], batch: Batch, keys: Key[Array, " batch"], terms: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """{term: {network: |d mean(term) / d network|}} over a batch, in training mode, with schedules at their end.

    The terms are the metrics in `terms` that the objective returns, and the loss last. An exact 0 means that the term
    does not train the network. The networks are those of the function `networks`.
    """
    state = {name: value for name, value in variables.items() if name != "params"}
    found: list[str] = []

    def means(params):
        metrics, _ = objective({"params": params, **state}, batch, keys, True, None)
        found[:] = [name for name in (*terms, "loss") if name in metrics]
        sums = (total(metrics[name], batch.weight) for name in found)
        return jnp.stack([value / jnp.maximum(weight, 1e-30) for value, weight in sums])  # 0 without weight

    _, pull = jax.vjp(means, variables["params"])

    def norms(direction):
        return {network: optax.tree.norm(part) for network, part in networks(pull(direction)[0]).items()}

    rows = jax.lax.map(norms, jnp.eye(len(found)))  # sequential backward passes, compiled once
    return {name: {network: norm[i] for network, norm in rows.items()} for i, name in enumerate(found)}


def routing_table(routing: Mapping[str, Mapping[str, Any]], terms: Sequence[str]) -> list[str]:
    """The lines of a Markdown table of `gradient_routing`: rows in the order of `terms`, the encoder's column first."""
    columns = sorted(routing["loss"], key=lambda network: (network != "encoder", network))
    lines = [f"| norm of the gradient | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
    for term in (*terms, "loss"):
        if term in routing:
            norms = (float(routing[term][network]) for network in columns)
            lines.append(f"| {term} | {' | '.join('0' if norm == 0 else f'{norm:.3g}' for norm in norms)} |")
    return lines
