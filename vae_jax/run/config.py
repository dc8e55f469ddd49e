"""A config's sections -> calls. Names and types are checked here, since Linen checks none."""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, get_args, get_origin

import numpy as np

LARGEST = {int: 2**32, float: float(np.finfo(np.float32).max)}  # numbers in a config


def bind(section: str, function: Callable, values: Mapping) -> functools.partial:
    """`function` with a section's values as keywords; defaults filled in. Raises ValueError for an unknown, missing or mistyped one."""
    expected, prefix = fields(function), section and f"{section}."
    for name, value in values.items():
        if name not in expected:
            raise ValueError(
                f"unknown config field {prefix}{name}: {nearest(name, expected)}"
            )
        if not is_a(value, expected[name].annotation):
            wanted = type_name(expected[name].annotation)
            raise ValueError(
                f"config field {prefix}{name} is {value!r}, but must be of type {wanted}"
            )
        items = value if isinstance(value, tuple | list) else [value]
        for item in items:
            largest = LARGEST.get(type(item), math.inf)
            if isinstance(item, int | float) and abs(item) > largest:
                raise ValueError(
                    f"config field {prefix}{name} is beyond the largest number, {largest:.10g}"
                )
    for name, parameter in expected.items():
        if name not in values and parameter.default is parameter.empty:
            raise ValueError(f"config field {prefix}{name} is missing")
    defaults = {
        name: parameter.default
        for name, parameter in expected.items()
        if parameter.default is not parameter.empty
    }
    typed = {
        name: float(value) if expected[name].annotation is float else value
        for name, value in values.items()
    }
    return functools.partial(function, **(defaults | typed))


def choose(section: str, values: Mapping, choices: Mapping) -> functools.partial:
    """`bind` for the function that the section's `name` selects from `choices`."""
    values = dict(values)
    name = values.pop("name", None)
    if name not in choices:
        raise ValueError(
            f"unknown {section}.name {name!r}: {nearest(str(name), choices)}"
        )
    return bind(section, choices[name], values)


def fields(function: Callable) -> dict[str, inspect.Parameter]:
    """The parameters of `function` that a config sets: the keyword-only ones of a type that a config can hold."""
    parameters = inspect.signature(function).parameters
    configurable = (int, float, bool, str, tuple, Mapping)
    return {
        name: parameter
        for name, parameter in parameters.items()
        if parameter.kind == parameter.KEYWORD_ONLY
        and (get_origin(parameter.annotation) or parameter.annotation) in configurable
    }


def nearest(name: str, known: Collection[str]) -> str:
    """What to say to someone who wrote `name`."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"


def is_a(value: Any, annotation: Any) -> bool:
    """Whether a config's value is of the annotated type; whole numbers are floats too, but booleans are no numbers."""
    if get_origin(annotation) is tuple:
        return isinstance(value, tuple | list) and all(
            is_a(item, get_args(annotation)[0]) for item in value
        )
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool)
    return isinstance(value, annotation)


def type_name(annotation: Any) -> str:
    return str(annotation) if get_args(annotation) else annotation.__name__


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names -> values, as they are after a journey through JSON."""
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = list(value) if isinstance(value, tuple) else value
    return flat


def changes(stored: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """The fields in which `config` differs from the one that a run was started with, as "FIELD is OLD there, NEW here".

    Left out is what a run may change as it continues: section `run`, `data.manual_dir`, and more epochs
    where the optimizer does not depend on their number.
    """
    old, new = flatten(stored), flatten(config)
    for fields_ in (old, new):
        for name in [*fields_]:
            if name.startswith("run.") or name == "data.manual_dir":
                del fields_[name]
    if old.get("optimizer.schedule") == "constant" and not old.get("optimizer.warmup"):
        old["epochs"] = max(old["epochs"], new["epochs"])
    absent = "absent"
    return [
        f"{name} is {old.get(name, absent)} there, {new.get(name, absent)} here"
        for name in [*old, *(new.keys() - old.keys())]
        if old.get(name, absent) != new.get(name, absent)
    ]


def argument_docs(function: Callable) -> dict[str, str]:
    """What a docstring says of each argument, in its part "Args:" or "Attributes:"."""
    _, _, part = inspect.getdoc(function).partition("Args:\n")
    if not part:
        _, _, part = inspect.getdoc(function).partition("Attributes:\n")
    docs = {}
    for line in part.partition("\n\n")[0].splitlines():
        if line[4] != " ":
            name, _, text = line.strip().partition(": ")
            docs[name] = text
        else:
            docs[name] += " " + line.strip()
    return docs


def derive(function: Callable, **known: Any) -> Any:
    """`function` called with those of the known values that its positional parameters name."""
    parameters = inspect.signature(function).parameters.values()
    wanted = [p.name for p in parameters if p.kind == p.POSITIONAL_OR_KEYWORD]
    return function(**{name: known[name] for name in wanted})


def make_title(network: Any, data_name: str) -> str:
    """What is trained on what, for people."""
    return f"{type(network).__name__} on {Path(data_name).name}"
