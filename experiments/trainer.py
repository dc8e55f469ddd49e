"""Train the classifier for several seeds in one program, each seed on its own rows."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from configs import classifier as classifier_config
from experiments import arms
from vae_jax.batch import Dataset, Split, named_key
from vae_jax.families import classifier
from vae_jax.objectives import Objective
from vae_jax.optimizers import make_adam
from vae_jax.run.devices import compiler_options
from vae_jax.run.evaluate import map_examples
from vae_jax.run.seeds import map_seeds, root_keys
from vae_jax.steps import init_state, make_run_steps, make_train_step

RECIPE = {name: value for name, value in classifier_config.get_config().to_dict()["optimizer"].items() if value}


class Trainer:
    """Trains the classifier on rows of a pool by the recipe of configs/classifier.py, all seeds in one program."""

    def __init__(self, dataset: Dataset, settings: dict):
        self._seeds = range(settings["seeds"])
        self._steps, self._batch_size = settings["steps"], settings["batch_size"]
        self._keys = root_keys(self._seeds)
        recipe = {name: value for name, value in RECIPE.items() if name not in ("name", "ema_decay")}
        self._optimizer = make_adam(self._steps, **recipe)
        shape = dataset.image_shape
        self._model = classifier.make(shape, dataset.num_classes)
        make = functools.partial(classifier.make_objective, self._model, shape)
        self._programs = {
            False: self._make_program(make()),
            True: self._make_program(make(shift=arms.SHIFT, rotation=arms.ROTATION)),
        }

    def _make_program(self, objective: Objective) -> Callable:
        train_step = make_train_step(objective, self._optimizer)
        run_steps = make_run_steps(train_step, self._batch_size, self._steps)

        def program(key, order, label, image):
            variables = self._model.init(named_key(key, "init"))
            state = init_state(variables, self._optimizer, key)
            # The noise depends on the place in the order: copies of an image are shifted differently.
            places = jnp.arange(self._steps * self._batch_size)
            state, _ = run_steps(state, (places, order), 0, self._steps, image, label)
            return state.variables

        options = compiler_options(training=True)
        return jax.jit(map_seeds(program, 3, len(self._seeds)), compiler_options=options)

    def __call__(self, image, label, rows: list[np.ndarray], augmented: bool) -> dict:
        """Train all seeds and return their variables.

        Each seed reads its own rows, and its own labels if `label` is [seeds, images].
        """
        label = jnp.broadcast_to(label, (len(self._seeds), len(image)))
        length = self._steps * self._batch_size
        order = [arms.reading_order(own, length, (seed, 1)) for seed, own in zip(self._seeds, rows)]
        return self._programs[augmented](self._keys, np.stack(order), label, image)

    def make_predict(self, split: Split) -> Callable[[dict], dict[str, np.ndarray]]:
        """`predict(variables)`: each image's `prediction` and its `confidence`, [seeds, images]."""
        probes = classifier.make_probes(self._model)

        predict = map_examples(probes.measure, split, len(self._seeds))
        return lambda variables: predict(variables, self._keys)
