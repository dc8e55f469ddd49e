"""The wall: science imports no machinery and nothing heavy; and what the package offers to whoever imports it."""

import ast
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import vae_jax

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "vae_jax"
SCIENCE = (
    "batch",
    "model",
    "objectives",
    "likelihoods",
    "priors",
    "augment",
    "generate",
    "figures",
    "steps",
    "optimizers",
    "nn",
    "families",
    "evaluation",
)
MACHINERY = ("data", "run")
ABOVE_BOTH = (
    "__init__",
    "__main__",
    "main",
    "commands",
    "pretrained",
    "full_evaluation",
    "export",
    "weights",
)
HEAVY = {
    "ml_collections",
    "orbax",
    "tensorflow_datasets",
    "tensorflow",
    "matplotlib",
    "tqdm",
    "sklearn",
    "PIL",
    "psutil",
    "docstring_parser",
}
ALLOWED = sys.stdlib_module_names - {"importlib"} | {"numpy", "scipy", "jax", "flax", "optax", "jaxtyping"}
INSIDE_FUNCTIONS = {"matplotlib": "figures", "sklearn": "evaluation"}  # and the room that may import it there


def module_name(path):
    """vae_jax/nn/layers.py -> vae_jax.nn.layers; vae_jax/nn/__init__.py -> vae_jax.nn.__init__"""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


FILES = {module_name(path): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def room(module):
    """The room of a module: "nn" for vae_jax.nn.layers, "" for the package itself."""
    return module.partition(".")[2].partition(".")[0]


SCIENCE_FILES = [module for module in FILES if room(module) in SCIENCE]


def imports(module, source):
    """Each imported name in full, and whether only a function or a type checker runs the import."""
    found = []

    def visit(node, deferred):
        if isinstance(node, ast.Import):
            found.extend((alias.name, deferred) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: -node.level] if node.level else []
            base = ".".join([*parents, *(node.module or "").split(".")]).strip(".")
            found.extend((f"{base}.{alias.name}", deferred) for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            found.append((ast.unparse(node.args[0]).strip("'"), deferred))
        inside = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            inside = True
        for child in ast.iter_child_nodes(node):
            visit(child, deferred or inside)

    visit(ast.parse(source), False)
    return found


def breaches(module, source):
    """The imports of a science file that the wall forbids."""
    found = []
    for name, deferred in imports(module, source):
        top, here = name.partition(".")[0], room(module)
        if top == "vae_jax":
            allowed = room(name) in SCIENCE
        elif name.startswith("flax.linen"):
            allowed = here == "nn"
        elif top in INSIDE_FUNCTIONS:
            allowed = here == INSIDE_FUNCTIONS[top] and deferred
        else:
            allowed = top in ALLOWED
        if not allowed:
            found.append(name)
    return found


def test_every_file_is_in_a_room():
    """A new file is science, machinery, or above both; the wall follows from that."""
    rooms = {room(module) for module in FILES}
    assert rooms <= {*SCIENCE, *MACHINERY, *ABOVE_BOTH}
    assert {*SCIENCE, *MACHINERY} <= rooms


@pytest.mark.parametrize("module", SCIENCE_FILES)
def test_science_imports_no_machinery(module):
    assert breaches(module, FILES[module]) == []


@pytest.mark.parametrize(
    "module,source,caught",
    [
        ("steps", "from vae_jax.run import seeds", "vae_jax.run.seeds"),
        ("steps", "from vae_jax.run.seeds import mean_metrics", "vae_jax.run.seeds.mean_metrics"),
        ("steps", "import vae_jax.run.loop as loop", "vae_jax.run.loop"),
        ("steps", "import vae_jax", "vae_jax"),
        ("steps", "from vae_jax import load", "vae_jax.load"),
        ("batch", "from .data import load", "vae_jax.data.load"),
        ("nn.layers", "from ..run.devices import Devices", "vae_jax.run.devices.Devices"),
        ("families.__init__", "from ..run.devices import Devices", "vae_jax.run.devices.Devices"),
        ("families.vae", "def make():\n    from vae_jax.pretrained import load", "vae_jax.pretrained.load"),
        ("families.vae", "from importlib import import_module", "importlib.import_module"),
        ("families.vae", "run = importlib.import_module('vae_jax.run')", "vae_jax.run"),
        ("families.vae", "run = __import__('vae_jax.run')", "vae_jax.run"),
        ("families.vae", "def load(name):\n    return import_module(f'vae_jax.{name}')", "f'vae_jax.{name}"),
        ("families.vae", "from configs import vae", "configs.vae"),
        ("families.vae", "import flax.linen as nn", "flax.linen"),
        ("families.vae", "from flax import linen as nn", "flax.linen"),
        ("families.vae", "from flax.linen import Module", "flax.linen.Module"),
        ("evaluation.latents", "import orbax.checkpoint as ocp", "orbax.checkpoint"),
        ("evaluation.latents", "from sklearn.manifold import TSNE", "sklearn.manifold.TSNE"),
        ("evaluation.latents", "def draw():\n    import matplotlib.pyplot", "matplotlib.pyplot"),
        ("figures", "import matplotlib.pyplot as plt", "matplotlib.pyplot"),
        ("figures", "if True:\n    from matplotlib import figure", "matplotlib.figure"),
        ("figures", "class A:\n    import matplotlib", "matplotlib"),
        ("figures", "def draw():\n    import sklearn", "sklearn"),
        ("augment", "from ml_collections import ConfigDict", "ml_collections.ConfigDict"),
    ],
)
def test_a_breach_is_caught(module, source, caught):
    assert breaches(f"vae_jax.{module}", source) == [caught]


@pytest.mark.parametrize(
    "module,source",
    [
        ("steps", "import math\nfrom collections.abc import Callable\nimport flax.struct, jax.numpy as jnp"),
        ("families.vae", "from vae_jax import figures, generate\nfrom vae_jax.families import Model\nfrom . import x"),
        ("nn.layers", "import flax.linen as nn\nfrom .convolution import conv\nfrom ..batch import Batch"),
        ("figures", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from matplotlib.figure import Figure"),
        ("figures", "def draw():\n    import matplotlib.pyplot"),
        ("evaluation.latents", "def tsne():\n    from sklearn.manifold import TSNE"),
    ],
)
def test_what_the_wall_allows(module, source):
    assert breaches(f"vae_jax.{module}", source) == []


def test_importing_science_imports_nothing_heavy():
    """Each module alone, as the first of the package, in one process that forgets the package before the next."""
    names = [module.removesuffix(".__init__") for module in SCIENCE_FILES]
    code = f"""
import importlib, json, sys
found = {{}}
for name in ["vae_jax", *{names}]:
    for module in [module for module in sys.modules if module.startswith("vae_jax")]:
        del sys.modules[module]
    importlib.import_module(name)
    found[name] = list(sys.modules)
print(json.dumps(found))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout)
    assert len(found) == len(SCIENCE_FILES) + 1
    for name, modules in found.items():
        assert name in modules
        assert not HEAVY & {module.partition(".")[0] for module in modules}, name
        loaded = {room(module) for module in modules if module.startswith("vae_jax.")}
        assert loaded <= set(SCIENCE), name


@pytest.mark.parametrize("module", FILES)
def test_the_package_never_imports_configs_or_experiments(module):
    tops = {name.partition(".")[0] for name, _ in imports(module, FILES[module])}
    assert not tops & {"configs", "experiments", "tests"}
    assert "experiments" not in FILES[module] and "import configs" not in FILES[module]


def test_the_public_surface():
    """`dir(vae_jax)` lists the rooms of science, `load` and `__version__`; each is imported on demand."""
    names = dir(vae_jax)
    assert names == sorted({"__version__", "load", *SCIENCE})
    for name in names:
        assert getattr(vae_jax, name) is not None
    assert vae_jax.load.__module__ == "vae_jax.pretrained"
    assert vae_jax.steps is sys.modules["vae_jax.steps"]
    with pytest.raises(AttributeError, match="module 'vae_jax' has no attribute 'nonsense'"):
        vae_jax.nonsense  # noqa: B018


def test_the_version_is_that_of_the_installed_package():
    assert vae_jax.__version__ == metadata.version("vae_jax")
    assert vae_jax.__version__[0].isdigit()


def test_type_checkers_find_the_package():
    assert (PACKAGE / "py.typed").exists()
