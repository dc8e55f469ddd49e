"""Reusing the steps pulls in nothing that they do not use, and the package knows neither configs nor experiments."""

import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = (
    "ml_collections",
    "orbax",
    "tensorflow_datasets",
    "tensorflow",
    "matplotlib",
    "tqdm",
    "sklearn",
    "PIL",
)


@pytest.mark.parametrize(
    "room",
    [
        "batch",
        "augment",
        "steps",
        "optimizers",
        "objectives",
        "nn.networks",
        "nn.convolution",
        "generate",
    ],
)
def test_reusing_a_room_imports_nothing_heavy(room):
    code = f"import sys, vae_jax.{room}; print(*(name for name in {HEAVY} if name in sys.modules))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == []


def test_the_package_never_imports_configs_or_experiments():
    for path in Path(__file__).parents[1].glob("vae_jax/**/*.py"):
        text = path.read_text()
        assert (
            "import configs" not in text
            and "from configs" not in text
            and "experiments" not in text
        ), path
        assert "flax.linen" not in text or path.parent.name == "nn", path
