"""Does generated training data help? The post's Table 5, and the controls that it lacks.

    python -m experiments.augmentation --workdir=runs/augmentation [--data=mnist]

A VAE learns half A of the training images, without their labels. The classifier learns p % of half B and, by arm, other
images beside them; every arm takes the same number of steps, and all seeds train in one program. How much noise the
generated images get is chosen once, on images of half B that the classifier does not see. Arm h is a recipe for generated
images that does help: those of a sharper VAE, of images without labels, with labels by the classifier of arm c. Each finished
run is a line of results.jsonl: the same command continues an interrupted study. It ends with summary.md and figures.
"""

import fcntl
import functools
import itertools
import json
import os
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from matplotlib.figure import Figure

import vae_jax
from configs import classifier as classifier_config
from experiments import launch
from experiments.report import markdown_table
from vae_jax import batch, data, generate
from vae_jax.batch import example_keys
from vae_jax.data import own
from vae_jax.evaluation.statistics import mean_and_interval
from vae_jax.figures import show_image
from vae_jax.nn.networks import make_classifier
from vae_jax.objectives import cross_entropy, reparameterize
from vae_jax.optimizers import make_adam
from vae_jax.pretrained import TrainedVAE
from vae_jax.run import files
from vae_jax.run.config import changes
from vae_jax.run.evaluate import make_evaluate
from vae_jax.run.files import read_objects, save_figure, whole_file, write_whole
from vae_jax.run.loop import make_run_chunk
from vae_jax.run.seeds import map_seeds, root_keys
from vae_jax.run.session import fingerprint
from vae_jax.steps import fixed_key, init_state, make_train_step

PERCENTAGES = (1.0, 5.0, 20.0, 50.0, 100.0)
FEWEST = 10  # real images a class that a default percentage leaves
CHOICE_PERCENTAGE = 20.0
SHARES, SCALES = (0.5, 1.0), (0.25, 0.5, 1.0)  # of which the study's noise is chosen
SWEEP = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)
SWEPT = 10_000  # generated images at each point of the sweep
SHIFT, ROTATION = 2, 10.0  # pixels, degrees: the classical augmentation
SHARP = {"objective.beta": 0.02, "model.latent_dim": 32}  # the VAE of arm h
BEGINNING = {"lock", "settings.tmp"}  # all that a killed beginning leaves
SURE = 0.9  # the probability of a label from which on it is taken for true


class Arm(NamedTuple):
    """What the classifier learns beside p % of half B."""

    label: str
    beside: str = ""  # a part of the pool; as many images as there are real ones
    augmented: bool = False  # by shifts and rotations
    taught: bool = False  # the labels beside are those that arm c's classifier is sure of, and there are all of these


ARMS = {
    "a": Arm("real images"),
    "b": Arm("real, each twice", "real"),
    "c": Arm("real, shifted and rotated", augmented=True),
    "d": Arm("real + generated from A with A's labels (the post)", "generated from A"),
    "e": Arm("real + the originals of those of A", "originals of A"),
    "f": Arm("real + generated from the same real ones", "generated from B"),
    "g": Arm("as f, shifted and rotated as in c", "generated from B", augmented=True),
    "h": Arm(
        "as c + drawn from A, labelled by c's classifier",
        "drawn from A",
        augmented=True,
        taught=True,
    ),
    "i": Arm(
        "as c + originals of A, labelled so too",
        "originals of A",
        augmented=True,
        taught=True,
    ),
}
PAIRS = {
    "f-b": "generated images against repeating the real ones",
    "f-c": "generated images against shifts and rotations",
    "g-c": "generated images beside shifts and rotations",
    "d-e": "generated images against their own originals, all with A's labels",
    "h-c": "generated images of A without A's labels, beside shifts and rotations",
    "h-i": "the same against their own originals",
}


class Pool(NamedTuple):
    """All images that any arm learns, one part after the other: a run only differs in the order in which it reads them."""

    image: jax.Array  # uint8
    label: jax.Array
    start: dict  # {part: its first position}


def stratified_order(label: np.ndarray, key: tuple) -> np.ndarray:
    """All positions in an order, a pure function of `key`, of which every beginning holds the classes in proportion."""
    rng = np.random.default_rng(key)
    place = np.empty(len(label))
    for value in np.unique(label):
        members = rng.permutation(np.flatnonzero(label == value))
        place[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(place, kind="stable")


def halves(label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of halves A and B of the training images: part of the study, the same for every seed."""
    order = stratified_order(label, (own.SPLIT_SEED, 0))
    return np.sort(order[: len(order) // 2]), np.sort(order[len(order) // 2 :])


def vary_images(vae: TrainedVAE, image: np.ndarray, choose_z: Callable) -> np.ndarray:
    """decode(choose_z(mean, logvar, keys)) of each image, uint8; its noise belongs to the image's position."""
    keys = example_keys(jax.random.key(0), 0, jnp.arange(len(image)))
    z = choose_z(*map(jnp.asarray, vae.encode(image)), keys)
    return np.round(vae.decode(z) * 255).astype(np.uint8)


def generate_images(
    vae: TrainedVAE, image: np.ndarray, share: float, scale: float
) -> np.ndarray:
    """A variation of each image, as the post makes them."""
    return vary_images(
        vae, image, lambda mean, _, keys: generate.perturb(mean, keys, share, scale)
    )


def make_pool(parts: dict[str, batch.Split]) -> Pool:
    sizes = [len(part.label) for part in parts.values()]
    starts = np.cumsum([0, *sizes[:-1]]).tolist()
    image, label = (np.concatenate(arrays) for arrays in zip(*parts.values()))
    return Pool(*jax.device_put((image, label)), dict(zip(parts, starts)))


def training_rows(
    arm: Arm, pool: Pool, real: np.ndarray, sources: np.ndarray
) -> np.ndarray:
    """Positions in the pool that an arm learns, from those of its real images in half B and of its sources in half A."""
    rows = pool.start["real"] + real
    if not arm.beside:
        return rows
    others = sources if arm.beside.endswith("A") else real
    if len(others) > len(real):  # half of what is read stays real
        rows = np.resize(rows, len(others))
    return np.concatenate([rows, pool.start[arm.beside] + others])


def taught_labels(label: jax.Array, part: slice, prediction: np.ndarray) -> jax.Array:
    """The labels of the pool for each seed, [seeds, images], of which those of the part are the predictions."""
    return jnp.tile(label, (len(prediction), 1)).at[:, part].set(prediction)


def reading_order(rows: np.ndarray, length: int, key: tuple) -> np.ndarray:
    """`rows` in one random order after the other, cut off at `length`."""
    rng = np.random.default_rng(key)
    rounds = [rng.permutation(rows) for _ in range(-(-length // len(rows)))]
    return np.concatenate(rounds)[:length].astype(np.int32)


class Trainer:
    """Trains the classifier on rows of a pool, several seeds in one program, by the recipe of configs/classifier.py."""

    def __init__(self, image_shape: tuple, num_classes: int, settings: dict):
        seeds, steps, batch = (
            settings[name] for name in ("seeds", "steps", "batch_size")
        )
        self._seeds, self._steps, self._batch = range(seeds), steps, batch
        self._keys = root_keys(self._seeds)
        recipe = classifier_config.get_config().to_dict()["optimizer"]
        del recipe["name"], recipe["average"]
        self._optimizer = make_adam(steps, **recipe)
        network = make_classifier(image_shape, num_classes)
        self._init = lambda key: network.init(
            fixed_key(key, "init"), jnp.zeros((1, *image_shape))
        )
        self._objective = functools.partial(
            cross_entropy,
            apply=functools.partial(network.apply, mutable=["batch_stats"]),
        )
        self._programs = {flag: self._make_program(flag) for flag in (False, True)}

    def _make_program(self, augmented: bool) -> Callable:
        objective = self._objective
        if augmented:
            objective = functools.partial(objective, shift=SHIFT, rotation=ROTATION)
        train_step = make_train_step(objective, self._optimizer)
        run_chunk = make_run_chunk(train_step, self._batch, self._steps)

        def program(key, order, label, image):
            state = init_state(self._init(key), self._optimizer, key)
            state, _ = run_chunk(state, order, 0, self._steps, image, label)
            return state.variables

        return jax.jit(map_seeds(program, 3))

    def __call__(self, image, label, rows: list, augmented: bool = False) -> dict:
        """The variables of all seeds, of which each learns rows of its own, with its own labels where they have seeds in front."""
        label = jnp.broadcast_to(label, (len(self._seeds), len(image)))
        order = np.stack(
            [
                reading_order(own, self._steps * self._batch, (seed, 1))
                for seed, own in zip(self._seeds, rows)
            ]
        )
        return self._programs[augmented](self._keys, order, label, image)

    def make_judged(self, split: batch.Split) -> Callable[[dict], dict]:
        """`judged(variables)`: `accuracy`, `prediction` and `confidence`, [seeds, examples of the split] each."""
        evaluate = make_evaluate(self._objective, split, map_seeds)
        return lambda variables: evaluate(variables, self._keys)


class Study:
    """The directory of a study: settings.json, and results.jsonl with a line for each run, which is never made twice.

    Raises OSError where another process works there, or where the study there has other settings.
    """

    def __init__(self, path: str, settings: dict):
        self.path = files.local_path(path)
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.path / "lock", os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OSError(
                f"another process is at work in {self.path}: wait for it"
            ) from None
        file = self.path / "settings.json"
        if file.exists():
            stored = json.loads(file.read_text("utf-8"))
            if different := changes(stored, settings):
                raise FileExistsError(
                    f"{self.path} holds another study ({'; '.join(different)}): name another with --workdir"
                )
        elif {entry.name for entry in self.path.iterdir()} - BEGINNING:
            raise FileExistsError(
                f"{self.path} is not empty and holds no study: name another with --workdir"
            )
        write_whole(file, json.dumps(settings, indent=1) + "\n")
        self._file = self.path / "results.jsonl"
        self.rows = read_objects(self._file)
        # Without a line torn by a crash.
        write_whole(self._file, "".join(json.dumps(row) + "\n" for row in self.rows))

    def close(self) -> None:
        os.close(self._lock)

    def result(self, name: dict, compute: Callable[[], dict]) -> dict:
        """The stored result of the run with this name, or else a computed one, which is then stored."""
        for row in self.rows:
            if name.items() <= row.items():
                return row
        start = time.monotonic()
        row = name | compute() | {"seconds": round(time.monotonic() - start, 1)}
        with open(self._file, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.rows.append(row)
        print(
            "  ".join(f"{key} {shorten(value)}" for key, value in row.items()),
            flush=True,
        )
        return row


def shorten(value):
    if isinstance(value, list):
        return " ".join(map(shorten, value))
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def read_study(path: Path) -> tuple[list[dict], dict]:
    """The results and the settings of a finished study. Raises ValueError if there is none."""
    if not (path / "summary.md").exists():
        raise ValueError(f"{path} is missing or not finished: run its part first")
    settings = json.loads((path / "settings.json").read_text("utf-8"))
    return read_objects(path / "results.jsonl"), settings


def check_percentages(given: list | None, size: int, num_classes: int) -> list[float]:
    """The percentages of a half of `size` images. Raises ValueError for one that cannot be."""
    if given is None:
        enough = [p for p in PERCENTAGES if p / 100 * size >= FEWEST * num_classes]
        return enough or [100.0]
    try:
        percentages = [float(item) for item in given or [""]]
    except ValueError:
        raise ValueError(
            f"--percentages is {','.join(given)!r}, but must be numbers with commas between"
        ) from None
    for percentage in percentages:
        if not 0 < percentage <= 100:
            raise ValueError(
                f"--percentages has {percentage:g}, but must lie in (0, 100]"
            )
        if count_of(percentage, size) < num_classes:
            raise ValueError(
                f"{percentage:g} % of half B are {count_of(percentage, size)} images, fewer than the {num_classes} classes: "
                f"give at least {100 * num_classes / size:.2g}"
            )
    return percentages


def count_of(percentage: float, size: int) -> int:
    return round(percentage / 100 * size)


def choice_percentage(settings: dict) -> float:
    """The share of half B that is learned while the noise is chosen, by the rest of it."""
    return max(CHOICE_PERCENTAGE, min(settings["percentages"]))


def run_study(
    study: Study, settings: dict, dataset: batch.Dataset, manual_dir: str
) -> None:
    """Everything that is not there yet."""
    train, test = dataset.splits["train"], dataset.splits["test"]
    a, b = halves(train.label)
    half_a, half_b = (
        batch.Split(train.image[half], train.label[half]) for half in (a, b)
    )
    workdir, fields = str(study.path / "classifier"), {"data.name": settings["data"]}
    launch.run(launch.make_command(settings["classifier"], workdir, fields, manual_dir))
    images = study.path / "half_a.npz"
    if not images.exists():
        with whole_file(images) as part, open(part, "wb") as file:
            np.savez_compressed(
                file,
                image=half_a.image,
                label=half_a.label,
                test_image=test.image,
                test_label=test.label,
            )
    for name, fields in [("vae", {}), ("sharp", SHARP)]:
        workdir = str(study.path / name)
        fields = {"data.name": str(images)} | fields
        launch.run(launch.make_command(settings["vae"], workdir, fields))
    vae, sharp, judge = (
        vae_jax.load(str(study.path / name)) for name in ("vae", "sharp", "classifier")
    )

    seeds = settings["seeds"]
    trainer = Trainer(dataset.image_shape, dataset.num_classes, settings)
    real = [stratified_order(half_b.label, (seed, 2)) for seed in range(seeds)]
    sources = [stratified_order(half_a.label, (seed, 3)) for seed in range(seeds)]

    def first(orders, percentage):
        return [order[: count_of(percentage, len(b))] for order in orders]

    def arm_rows(arm, pool, percentage):
        return [
            training_rows(arm, pool, own, others)
            for own, others in zip(first(real, percentage), first(sources, percentage))
        ]

    for share, scale in itertools.product(SHARES, SWEEP):
        study.result(
            {"stage": "sweep", "share": share, "scale": scale},
            functools.partial(relabelled, vae, judge, half_a, share, scale),
        )

    percentage = choice_percentage(settings)
    judged_b = trainer.make_judged(half_b)

    def generated(half, share, scale):
        return half._replace(image=generate_images(vae, half.image, share, scale))

    def choose(share, scale):
        parts = {"real": half_b, "generated from B": generated(half_b, share, scale)}
        pool = make_pool(parts)
        variables = trainer(*pool[:2], arm_rows(ARMS["f"], pool, percentage))
        unseen = [own[count_of(percentage, len(b)) :] for own in real]
        found = zip(judged_b(variables)["accuracy"], unseen)
        return {"accuracy": [float(row[own].mean()) for row, own in found]}

    if count_of(percentage, len(b)) < len(b):
        for share, scale in itertools.product(SHARES, SCALES):
            study.result(
                {"stage": "choice", "share": share, "scale": scale},
                functools.partial(choose, share, scale),
            )

    share, scale = chosen(study.rows)
    judged_test = trainer.make_judged(test)

    @functools.cache
    def pool():
        drawn = vary_images(sharp, half_a.image, reparameterize)
        return make_pool(
            {
                "real": half_b,
                "generated from A": generated(half_a, share, scale),
                "originals of A": half_a,
                "generated from B": generated(half_b, share, scale),
                "drawn from A": half_a._replace(image=drawn),
            }
        )

    @functools.cache
    def trained(percentage, name):
        arm, (image, label, _) = ARMS[name], pool()
        if not arm.taught:
            rows = arm_rows(arm, pool(), percentage)
            return trainer(image, label, rows, arm.augmented)
        start = pool().start[arm.beside]
        part = slice(start, start + len(a))
        judged_part = trainer.make_judged(batch.Split(image[part], label[part]))
        found = judged_part(trained(percentage, "c"))
        label = taught_labels(label, part, found["prediction"])
        rows = [
            training_rows(arm, pool(), own, np.flatnonzero(sure))
            for own, sure in zip(first(real, percentage), found["confidence"] >= SURE)
        ]
        return trainer(image, label, rows, arm.augmented)

    def learn(percentage, name):
        found = judged_test(trained(percentage, name))
        return {"accuracy": [float(row.mean()) for row in found["accuracy"]]}

    for percentage, name in itertools.product(settings["percentages"], ARMS):
        study.result(
            {"stage": "arm", "percentage": percentage, "arm": name},
            functools.partial(learn, percentage, name),
        )

    folder = study.path / "figures"
    folder.mkdir(exist_ok=True)
    save_figure(draw_arms(study.rows, settings), folder / "arms.png")
    save_figure(
        draw_sweep(study.rows, vae, test, share, settings), folder / "noise.png"
    )
    write_whole(study.path / "summary.md", summarize(study.rows, settings))


def relabelled(
    vae, judge, sources: batch.Split, share: float, scale: float
) -> dict[str, float]:
    """The share of generated images that the judge gives another label than their sources have."""
    image = generate_images(vae, sources.image[:SWEPT], share, scale)
    label, _ = judge.predict(image)
    return {"relabelled": float(np.mean(label != sources.label[:SWEPT]))}


def chosen(rows) -> tuple[float, float]:
    """The noise with the highest mean accuracy of arm f; of equal ones, or where none could be tried, the least."""
    tried = [row for row in rows if row["stage"] == "choice"]
    if not tried:
        return SHARES[0], SCALES[0]
    best = max(tried, key=lambda row: np.mean(row["accuracy"]))
    return best["share"], best["scale"]


def swept(rows, share: float) -> list[float]:
    """The generated images that the judge gave another label, in %, at each noise of SWEEP."""
    found = {
        row["scale"]: row["relabelled"]
        for row in rows
        if row["stage"] == "sweep" and row["share"] == share
    }
    return [100 * found[scale] for scale in SWEEP]


def by_arm(rows) -> dict:
    """{(percentage, arm): accuracies of the seeds, in %}"""
    return {
        (row["percentage"], row["arm"]): 100 * np.array(row["accuracy"])
        for row in rows
        if row["stage"] == "arm"
    }


def difference(accuracy: dict, percentage: float, pair: str) -> tuple[float, float]:
    """The mean of the seeds' paired differences between two arms, and the half-width of its 95 % interval, in points."""
    one, other = pair.split("-")
    return mean_and_interval(accuracy[percentage, one] - accuracy[percentage, other])


def findings(rows, settings) -> list[str]:
    """What the differences say, in words."""
    accuracy, sentences = by_arm(rows), []
    for pair, what in PAIRS.items():
        verdicts = {"help": [], "hurt": [], "show no difference": []}
        for percentage in settings["percentages"]:
            mean, interval = difference(accuracy, percentage, pair)
            verdict = "show no difference"
            if abs(mean) > interval:
                verdict = "help" if mean > 0 else "hurt"
            verdicts[verdict].append(f"{percentage:g} % ({mean:+.2f} ± {interval:.2f})")
        said = [
            f"{verdict} at {', '.join(where)}"
            for verdict, where in verdicts.items()
            if where
        ]
        sentences.append(
            f"{what[0].upper()}{what[1:]} ({pair}): they {'; they '.join(said)}."
        )
    return sentences


def tables(rows, settings) -> list[tuple[str, list[list[str]]]]:
    """(title, rows of cells, the first one being the heading) of the study's tables."""
    accuracy, columns = by_arm(rows), settings["percentages"]
    heading = [f"{p:g} %" for p in columns]
    arms = [["arm", "the classifier learns", *heading]]
    for name, arm in ARMS.items():
        cells = [mean_and_interval(accuracy[p, name]) for p in columns]
        arms.append(
            [name, arm.label, *(f"{mean:.2f} ± {half:.2f}" for mean, half in cells)]
        )
    paired = [["pair", "compares", *heading]]
    for pair, what in PAIRS.items():
        cells = [difference(accuracy, p, pair) for p in columns]
        paired.append(
            [pair, what, *(f"{mean:+.2f} ± {half:.2f}" for mean, half in cells)]
        )
    noise = [["share of latents", *(f"noise {scale:g}" for scale in SWEEP)]]
    for share in SHARES:
        noise.append([f"{share:g}", *(f"{lost:.1f} %" for lost in swept(rows, share))])
    return [
        ("Test accuracy in %, by the share of half B", arms),
        ("Paired differences, in points", paired),
        ("Generated images that a classifier gives another label", noise),
    ]


def conditions(rows, settings) -> str:
    share, scale = chosen(rows)
    how = "the least that is tried, for want of images to choose it by"
    if any(row["stage"] == "choice" for row in rows):
        how = f"chosen at {choice_percentage(settings):g} % on images of half B that were not learned, by arm f"
    return (
        f"{settings['seeds']} seeds, {settings['steps']} steps of {settings['batch_size']} images in every arm; means with 95 % intervals. "
        f"Generated images: noise {scale:g} in {100 * share:g} % of the latents, {how}; "
        f"of arm h: one draw from q(z | x) of each image of half A, of a VAE with beta {SHARP['objective.beta']:g} "
        f"and {SHARP['model.latent_dim']} latents, where arm c's classifier is at least {100 * SURE:g} % sure of its label "
        "(a recipe found on MNIST, on images of half B that were not learned). Seeds differ in what is drawn from the halves, in the classifier's "
        "weights and in the order of images. The VAEs, what is generated and the test images are the same for all seeds: the intervals leave "
        "out how these vary, and show one difference in twenty where there is none."
    )


def summarize(rows, settings) -> str:
    parts = [
        f"# Does generated training data help? {settings['data']}",
        conditions(rows, settings),
    ]
    parts += [f"- {sentence}" for sentence in findings(rows, settings)]
    for title, cells in tables(rows, settings):
        parts += [f"## {title}", markdown_table(cells)]
    parts += [
        "![accuracy of the arms](figures/arms.png)",
        "![images by noise](figures/noise.png)",
    ]
    return "\n\n".join(parts) + "\n"


def draw_arms(rows, settings) -> Figure:
    """Accuracy of each arm, and the paired differences: a panel and a scale for each share of half B."""
    accuracy, columns = by_arm(rows), settings["percentages"]
    width = max(2, len(columns))
    figure = Figure(figsize=(1 + 2.3 * width, 8.5), layout="constrained")
    figure.suptitle(
        f"Generated training data: {settings['data']}, {settings['seeds']} seeds, 95 % intervals"
    )
    above, below = figure.subfigures(2, 1)

    def draw(part, unit, found, meanings):
        """`found(percentage, name)` is a mean and its interval; `meanings` are {name: what it stands for}."""
        panels = part.subplots(1, len(columns), squeeze=False)[0]
        for axes, percentage in zip(panels, columns):
            means, halves = zip(*(found(percentage, name) for name in meanings))
            axes.errorbar(range(len(means)), means, halves, fmt="o", capsize=3)
            axes.set_xticks(range(len(means)), meanings, fontsize=9)
            axes.set_title(f"{percentage:g} % of half B", fontsize=11)
            axes.grid(alpha=0.3)
        panels[0].set_ylabel(unit)
        told = "; ".join(f"{name}: {meaning}" for name, meaning in meanings.items())
        part.supxlabel(textwrap.fill(told, 28 * width), fontsize=10)
        return panels

    draw(
        above,
        "test accuracy, %",
        lambda percentage, name: mean_and_interval(accuracy[percentage, name]),
        {name: arm.label for name, arm in ARMS.items()},
    )
    differences = draw(
        below,
        "paired difference, points",
        lambda percentage, pair: difference(accuracy, percentage, pair),
        PAIRS,
    )
    for axes in differences:
        axes.axhline(0, color="black", linewidth=0.8)
    return figure


def draw_sweep(rows, vae, test: batch.Split, share: float, settings) -> Figure:
    """Variations of one test image of each class as the noise grows, under the share that lost its label."""
    shown = batch.first_of_each_label(test.label)
    image = test.image[shown]
    figure = Figure(figsize=(10, 4 + 0.75 * len(shown)), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3, 0.75 * len(shown)])
    axes = above.subplots()
    for one in SHARES:
        label = f"{100 * one:g} % of the latents"
        axes.plot(SWEEP, swept(rows, one), "o-", label=label)
    axes.set(
        xlabel="noise (the prior's standard deviation is 1)", ylabel="another label, %"
    )
    axes.set_title(
        f"Generated images that a classifier gives another label: {settings['data']}"
    )
    axes.grid(alpha=0.3)
    axes.legend()
    columns = [image] + [generate_images(vae, image, share, scale) for scale in SWEEP]
    names = ["original", *(f"{scale:g}" for scale in SWEEP)]
    below.suptitle(
        f"Test images, and variations with noise in {100 * share:g} % of the latents"
    )
    for grid, column, name in zip(
        below.subplots(len(shown), len(columns), squeeze=False).T, columns, names
    ):
        grid[0].set_title(name, fontsize=10)
        for cell, picture in zip(grid, column):
            show_image(cell, picture / 255)
    return figure


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    logging.set_verbosity(logging.WARNING)
    given = flags.FLAGS
    with launch.in_one_line("augmentation"):
        dataset = data.load(name=given.data, manual_dir=given.manual_dir)
        if min(split.label.min() for split in dataset.splits.values()) < 0:
            raise ValueError(
                f"{given.data} has images without labels, but the study needs all labels"
            )
        size = len(halves(dataset.splits["train"].label)[1])
        settings = {
            "data": given.data,
            "images": fingerprint(dataset),
            "percentages": check_percentages(
                given.percentages, size, dataset.num_classes
            ),
            "seeds": given.seeds,
            "steps": given.steps,
            "batch_size": given.batch_size,
            "vae": given.vae or launch.config_for("vae", given.data),
            "classifier": given.classifier
            or launch.config_for("classifier", given.data),
        }
        study = Study(given.workdir, settings)
        run_study(study, settings, dataset, given.manual_dir)
    print((study.path / "summary.md").read_text("utf-8"))


def define_flags() -> None:
    usual = ", ".join(f"{percentage:g}" for percentage in PERCENTAGES)
    flags.DEFINE_string("workdir", "runs/augmentation", "Where all of it goes.")
    flags.DEFINE_string("data", "mnist", "As --config.data.name of vae_jax.main.")
    flags.DEFINE_string("manual_dir", "", "As --config.data.manual_dir.")
    flags.DEFINE_list(
        "percentages",
        None,
        f"Of half B. Default: those of {usual} that leave {FEWEST} images a class.",
    )
    flags.DEFINE_integer("seeds", 5, "Trained together, from 0 on.", lower_bound=2)
    flags.DEFINE_integer("steps", 2500, "Of every arm.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 128, "Images a step.", lower_bound=1)
    flags.DEFINE_string(
        "vae", None, "Config of the VAE. Default: configs/vae.py, :digits for digits."
    )
    flags.DEFINE_string(
        "classifier",
        None,
        "Config of the classifier that judges generated images. Default: configs/classifier.py, :digits for digits.",
    )


if __name__ == "__main__":
    define_flags()
    app.run(main)
