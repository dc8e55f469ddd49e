"""The README's Python snippets run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import run_job, small_job

README = Path(__file__).parents[1] / "README.md"
SNIPPETS = re.findall(
    r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL
)


def test_there_are_snippets():
    assert SNIPPETS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder in which there is a run of the name that the README gives it."""
    folder = tmp_path_factory.mktemp("readme")
    job, config = small_job()
    run_job(job, config, folder / "runs" / "vae-digits")
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, folder):
    env = os.environ | {"PYTHONPATH": str(README.parent)}
    subprocess.run([sys.executable, "-c", snippet], cwd=folder, env=env, check=True)
