"""README.md and docs/*.md: their Python runs as it stands, and what they link to or name exists."""

import importlib
import re

import pytest
from program import QUICK, ROOT

from vae_jax import main
from vae_jax.families import FAMILIES
from vae_jax.run.session import describe

PATHS = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in PATHS}
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
BLOCKS = [(name, language, block) for name, text in PAGES.items() for language, block in BLOCK.findall(text)]
PYTHON = [(name, block) for name, language, block in BLOCKS if language == "python"]
FILE = re.compile(r"# (\w+)\.py\n")  # the first line of a block that a reader saves under this name
FILES = {FILE.match(block)[1]: block for _, block in PYTHON if FILE.match(block)}
SEVERAL_DEVICES = "jax.pmap("
SNIPPETS = [
    pytest.param(block, id=name, marks=pytest.mark.slow if SEVERAL_DEVICES in block else ())
    for name, block in PYTHON
    if not FILE.match(block)
]
COMMANDS = [
    re.sub(r" +#.*", "", line)
    for _, language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if re.search(r"-m vae_jax(\.main)? ", line)
]
LINK = re.compile(r'\]\(([^)\s]+)\)|src="([^"]+)"')
FIELDS = {field for field, _ in describe()}
SECTIONS = "|".join({field.partition(".")[0] for field in FIELDS if "." in field})


def commands_on(file):
    return [command for command in COMMANDS if f"={file}.py" in command]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, forks):
    """A folder with the pages' files, and a run of the name that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    for name, text in FILES.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    forks("-m", "vae_jax", f"--config={ROOT}/configs/vae.py:smoke", "--workdir=runs/vae-digits", cwd=folder).ends()
    return folder


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet_runs(snippet, folder, forks):
    forks("-c", snippet, cwd=folder, XLA_FLAGS=f"--xla_force_host_platform_device_count=8 {QUICK}").ends()


TRACE = """
import importlib, sys
import jax
from vae_jax.batch import Batch
from vae_jax.run import session
from vae_jax.steps import init_state, make_train_step

for name in sys.argv[1:]:
    job = session.build(importlib.import_module(name).get_config().to_dict())
    image, label = (jax.ShapeDtypeStruct((4, *part.shape[1:]), kind) for part, kind in zip(job.dataset.splits["train"], "fi"))
    batch = Batch(image, label, weight=jax.ShapeDtypeStruct((4,), "f"), index=label)
    state = jax.eval_shape(lambda key: init_state(job.init(key), job.optimizer, key), jax.random.key(0))
    metrics = jax.eval_shape(make_train_step(job.objective, job.optimizer), state, batch)[1]
    assert "loss" in metrics
"""


def test_config_files_build_and_trace(folder, forks):
    configs = [name for name in FILES if commands_on(name)]
    assert len(configs) == 4
    forks("-c", TRACE, *configs, cwd=folder).ends()


@pytest.mark.parametrize(
    "file",
    [pytest.param(file, marks=() if "linear" in file else pytest.mark.slow) for file in FILES if commands_on(file)],
)
def test_commands_on_a_file_run(file, folder, forks):
    for command in commands_on(file):  # in the page's order: the first one trains
        short = "--config.epochs=1", "--config.batch_size=700", "--config.run.likelihood_samples=0"
        program = forks(*command.removeprefix("python ").split(), *short, cwd=folder)
        assert "could not be made" not in program.ends() + program.stdout


def test_readme_is_short_and_has_the_two_commands():
    lines = PAGES["README.md"].splitlines()
    assert len(lines) <= 160
    install = "python3 -m venv .venv && .venv/bin/pip install -e"
    assert f"{install} . && .venv/bin/python -m vae_jax.main --config=configs/vae.py:digits" in lines
    assert f"{install} '.[test]' && .venv/bin/python -m pytest" in lines


def anchor(heading):
    """The name by which a Markdown viewer links to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def broken_links(page, text):
    """The relative links and images of a page that lead nowhere."""
    broken = []
    for link, source in LINK.findall(BLOCK.sub("", text)):
        path, _, heading = (link or source).partition("#")
        linked = (ROOT / page).parent / path if path else ROOT / page
        if path.startswith("https://"):
            continue
        if not linked.exists() or (
            heading
            and heading not in map(anchor, re.findall(r"^#+ (.*)", linked.read_text(encoding="utf-8"), re.MULTILINE))
        ):
            broken.append(link or source)
    return broken


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    assert broken_links(page, PAGES[page]) == []


def test_broken_links_are_found():
    text = '[a](none.md) [b](models.md#the-loss) [c](models.md#no-such-part) <img src="figures/none.png">'
    assert broken_links("docs/results.md", text) == ["none.md", "models.md#no-such-part", "figures/none.png"]


@pytest.mark.parametrize("page", sorted(PAGES.keys() - {"docs/CHANGELOG.md"}))  # which lists old names
def test_named_fields_exist(page):
    text = PAGES[page]
    named = re.findall(r"--config\.([a-z_.]+)", text) + re.findall(rf"`((?:{SECTIONS})\.[a-z_]+)(?:=\w+)?`", text)
    assert {field for field in named if not field.endswith(".py")} <= FIELDS


def test_named_flags_exist():
    known = {flag.name for flag in main.flags.FLAGS.get_key_flags_for_module(main)}
    for command in COMMANDS:
        assert set(re.findall(r" --([a-z_]+)", command.partition("-m vae_jax")[2])) <= known, command


def test_the_readme_links_to_every_page():
    for page in PAGES.keys() - {"README.md"}:
        assert f"]({page})" in PAGES["README.md"], page


@pytest.mark.parametrize("family", FAMILIES)
def test_models_page_is_complete(family):
    page = PAGES["docs/models.md"]
    assert f"| `{family}` |" in page
    for metric in FAMILIES[family].METRICS:
        assert f"| `{metric}` |" in page
    for variant in importlib.import_module(f"configs.{family}").VARIANTS:
        assert variant == "default" or f"`:{variant}`" in page
