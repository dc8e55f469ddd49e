"""Turn a config's sections into calls. Names and types are checked here, because Linen checks none."""

import dataclasses
import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import docstring_parser
import numpy as np

LARGEST = {int: 2**32, float: float(np.finfo(np.float32).max)}  # largest numbers in a config
SMALLEST = float(np.finfo(np.float32).tiny)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run proceeds; nothing here changes what is trained.

    Attributes:
        steps_per_call: training steps per call of the compiled program, and per row of metrics.jsonl.
        save_every: training steps between checkpoints; the end of training and each best epoch are also saved.
        keep: number of latest checkpoints to keep, besides the best one.
        figures_every: epochs between drawings of the figures; they are also drawn after the first and last epoch.
        likelihood_samples: draws of z for the summary's final estimate of log p(x), on 1,000 test images of 28x28 or
            fewer larger ones; 0: no estimate.
        log_to: also log metrics and figures to "tensorboard", "wandb" or "trackio", or to several, separated by commas.
        profile: write a trace of three calls into the run directory, for TensorBoard or Perfetto.
        compilation_cache: cache compiled programs on disk, so that the next start is faster.
    """

    steps_per_call: int = 20
    save_every: int = 500
    keep: int = 2
    figures_every: int = 10
    likelihood_samples: int = 100
    log_to: str = ""
    profile: bool = False
    compilation_cache: bool = True

    def __post_init__(self):
        from vae_jax.run.loggers import import_loggers

        import_loggers(self.log_to)
        for name in ("steps_per_call", "save_every", "keep", "figures_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"run.{name} is {getattr(self, name)}, but must be at least 1")
        if self.likelihood_samples < 0:
            raise ValueError(f"run.likelihood_samples is {self.likelihood_samples}, but must be at least 0")


def make_config(family: str, base: Mapping, variants: Mapping, variant: str) -> Any:
    """Make the ConfigDict of a config file: the family's defaults, changed by `base`, then by the chosen variant.

    `base` and each of `variants` map dotted fields to values. Raises ValueError for an unknown variant.
    """
    from vae_jax.run.config_dict import Config

    if variant not in variants:
        raise ValueError(f"there is no variant {variant!r} of the {family} config: give one of {', '.join(variants)}")
    config = defaults(family)
    for field, value in {**base, **variants[variant]}.items():
        *section, name = field.split(".")
        (config[section[0]] if section else config)[name] = value
    return Config(config)


def defaults(family: str, optimizer: str = "adam") -> dict[str, Any]:
    """The fields of a family's config with the signatures' defaults; only those top-level fields that have one."""
    from vae_jax.families import FAMILIES

    config: dict[str, Any] = {"seed": 0, "seeds": 1, "patience": 0}
    for section, functions in signatures(FAMILIES[family], optimizer).items():
        config[section] = {
            name: parameter.default for function in functions for name, parameter in fields(function).items()
        }
    config["model"] = {"name": family, **config["model"]}
    config["optimizer"] = {"name": optimizer, **config["optimizer"]}
    return config


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fill a stored config with the defaults of the fields that were added after it was written."""
    sections = [config.get(section) for section in ("model", "optimizer")]
    try:
        known = defaults(*(section["name"] for section in sections))
    except (KeyError, TypeError):  # a user's own family or optimizer, or no name
        return dict(config)
    filled = dict(config)
    for name, own in config.items():
        if isinstance(own, Mapping) and isinstance(known.get(name), Mapping):
            filled[name] = {**own, **known[name], **own}  # in the section's order; what it lacks comes last
    return known | filled


def differing(config: Mapping[str, Any]) -> dict[str, Any]:
    """The dotted fields of a config that differ from the defaults of its family and optimizer, or have no default."""
    names = {section: {"name": config.get(section, {}).get("name")} for section in ("model", "optimizer")}
    known = flatten(with_defaults(names))
    return {name: value for name, value in flatten(config).items() if known.get(name, ...) != value}


def signatures(family: Any, optimizer: str = "adam") -> dict[str, list[Callable]]:
    """The functions that take each section of a family's config by keyword."""
    from vae_jax.data import load
    from vae_jax.optimizers import OPTIMIZERS, ema

    return {
        "data": [load],
        "model": [family.make],
        "objective": [family.make_objective],
        "optimizer": [OPTIMIZERS[optimizer], ema],
        "run": [RunOptions],
    }


def bind(section: str, function: Callable, values: Mapping) -> functools.partial:
    """Bind a section's values to `function` as keywords, with its defaults filled in.

    Raises ValueError, naming the field, for an unknown, missing or mistyped one.
    """
    expected, prefix = fields(function), section and f"{section}."
    for name, value in values.items():
        if name not in expected:
            raise ValueError(f"unknown config field {prefix}{name}: {nearest(name, expected)}")
        check_value(prefix + name, value, expected[name].annotation)
    defaults = {
        name: parameter.default for name, parameter in expected.items() if parameter.default is not parameter.empty
    }
    for name in expected:
        if name not in values and name not in defaults:
            raise ValueError(f"config field {prefix}{name} is missing")
    typed = {name: as_annotated(value, expected[name].annotation) for name, value in values.items()}
    return functools.partial(function, **(defaults | typed))


def check_value(field: str, value: Any, annotation: Any) -> None:
    """Raise ValueError unless a config value has the annotated type and no number in it is too large or too small."""
    if not is_a(value, annotation):
        wanted = annotation if get_args(annotation) else annotation.__name__
        raise ValueError(f"config field {field} is {value!r}, but must be of type {wanted}")
    for item in value if isinstance(value, tuple | list) else [value]:
        largest = LARGEST.get(type(item), math.inf)
        if isinstance(item, int | float) and abs(item) > largest:
            raise ValueError(f"config field {field} is {str(item)[:24]}, but must be at most {largest:.10g} in size")
        if isinstance(item, float) and 0 < abs(item) < SMALLEST:
            raise ValueError(f"config field {field} is {item}, but must be 0 or at least {SMALLEST:.3g} in size")


def choose(section: str, choices: Mapping, values: Mapping) -> tuple[Any, dict]:
    """The entry of `choices` that a section's `name` selects, and the section's other values."""
    values = dict(values)
    name = values.pop("name", None)
    if not isinstance(name, str) or name not in choices:
        raise ValueError(f"unknown {section}.name {name!r}: {nearest(str(name), choices)}")
    return choices[name], values


def fields(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of `function` that a config sets: `name` and keyword-only ones of a type a config can hold."""
    parameters = inspect.signature(function).parameters
    configurable = (int, float, bool, str, tuple, Mapping)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if (parameter.kind == parameter.KEYWORD_ONLY or name == "name")
        and (get_origin(parameter.annotation) or parameter.annotation) in configurable
    }


def fill_in(function: Callable, **known: Any) -> Any:
    """Call `function` with those known values that its parameters name."""
    wanted = inspect.signature(function).parameters
    return function(**{name: known[name] for name in known if name in wanted})


def make_title(family: Any, data_name: str) -> str:
    """A title that names the family and the data set; a name that is not UTF-8 is escaped."""
    return f"{family.NAME} on {Path(data_name).name}".encode(errors="backslashreplace").decode()


def nearest(name: str, known: Collection[str]) -> str:
    """A hint for an unknown `name`: the closest known name, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def is_a(value: Any, annotation: Any) -> bool:
    """Whether a config value has the annotated type; integers count as floats, but booleans are not numbers."""
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple | list) and all(is_a(item, get_args(annotation)[0]) for item in value)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, annotation)


def as_annotated(value: Any, annotation: Any) -> Any:
    """Convert a config value to its annotation: integers to floats, JSON's lists to tuples."""
    if get_origin(annotation) is tuple:
        return tuple(as_annotated(item, get_args(annotation)[0]) for item in value)
    return float(value) if annotation is float else value


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Map dotted names to values, with lists in place of tuples, as JSON returns them."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def changes(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """List the fields in which `config` differs from a run's `stored` config, as "FIELD is OLD there, NEW here".

    The list leaves out what a resumed run may change: section `run`, `data.manual_dir`, and more epochs if the
    optimizer does not depend on their number. A new batch_size of 0 means the old one. A field that one of them lacks
    has its default.
    """
    old, new = (flatten(fields) | flatten(with_defaults(fields)) for fields in (stored, config))
    for flat in (old, new):
        for name in [*flat]:
            if name.startswith("run.") or name == "data.manual_dir":
                del flat[name]
    if old.get("optimizer.schedule") == "constant" and not old.get("optimizer.warmup"):
        old["epochs"] = max(old["epochs"], new["epochs"])
    if new.get("batch_size") == 0:  # it follows from the data, which are compared elsewhere
        new["batch_size"] = old.get("batch_size")
    absent = "absent"
    return [
        f"{name} is {old.get(name, absent)} there, {new.get(name, absent)} here"
        for name in [*old, *(new.keys() - old.keys())]
        if old.get(name, absent) != new.get(name, absent)
    ]


def argument_docs(function: Callable) -> dict[str, str]:
    """The description of each argument in a docstring's section "Args:" or "Attributes:"."""
    text = inspect.getdoc(function) or ""
    parsed = docstring_parser.parse(text, docstring_parser.DocstringStyle.GOOGLE)
    return {entry.arg_name: " ".join((entry.description or "").split()) for entry in parsed.params}
