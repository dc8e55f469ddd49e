"""Nonsense of every kind: one line reports it, in bounded time and memory, and nothing is executed or written."""

import ast
import contextlib
import functools
import gzip
import io
import json
import math
import os
import pickle
import struct
import tempfile
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from program import ROOT

from configs import classifier, vae
from vae_jax import data
from vae_jax.data import named
from vae_jax.run import session
from vae_jax.run.config import flatten
from vae_jax.run.directory import RunDirectory, read_config
from vae_jax.run.log import read_rows


def few_or(examples):
    """Parametrize a test by the number of its examples: a fifth of them, and all if slow tests run."""
    every = pytest.param(examples, marks=pytest.mark.slow)
    return pytest.mark.parametrize("examples", [examples // 5, every])


def fuzz(examples):
    """Run a function on drawn examples, the same each time, so that a failure is reproducible."""
    return hypothesis.settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )


@contextlib.contextmanager
def memory(limit):
    """Assert that Python and NumPy allocate at most `limit` bytes inside."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()


def one_line(function, *arguments, refused=(ValueError, OSError), **options):
    """What `function` returns; None if it raises one line."""
    try:
        return function(*arguments, **options)
    except refused as error:
        assert str(error) and "\n" not in str(error)
        return None


@st.composite
def damaged(draw, original):
    """`original` unchanged, cut, longer, or with some bytes changed."""
    content = bytearray(original)
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(len(content) - 1, 0)))
        match draw(st.sampled_from(["change", "cut", "add", "remove"])):
            case "change" if content:
                content[place] = draw(st.integers(0, 255))
            case "cut":
                del content[place:]
            case "add":
                content[place:place] = draw(st.binary(max_size=9))
            case "remove":
                del content[place : place + draw(st.integers(1, 9))]
    return bytes(content)


def idx(sizes, values):
    header = b"\0\0\x08" + bytes([len(sizes)]) + struct.pack(f">{len(sizes)}I", *sizes)
    return header + values


IDX = st.sampled_from([((2, 3), 6), ((5,), 5), ((2, 2, 2), 8), ((1, 1, 1, 1, 2), 2)])


@few_or(400)
def test_idx_files(tally, examples):
    """An array is read only from that array's own idx file."""

    @fuzz(examples)
    @hypothesis.given(st.data())
    def check(content):
        sizes, count = content.draw(IDX)
        plain = content.draw(damaged(idx(sizes, bytes(range(count)))))
        packed = content.draw(damaged(gzip.compress(plain, mtime=0)))
        with tally("bad inputs"):
            array = one_line(named.read_idx, io.BytesIO(plain))
            assert array is None or idx(array.shape, array.tobytes()) == plain
            with gzip.open(io.BytesIO(packed)) as file:
                array = one_line(named.read_idx, file)
            if array is not None:
                assert idx(array.shape, array.tobytes()) == gzip.decompress(packed)

    check()


@pytest.mark.parametrize("sizes", [(10,), (2**32 - 1,) * 4, (2**32 - 1, 2**31)])
def test_a_gzip_bomb_takes_no_more_than_it_declares(tally, sizes):
    packed = gzip.compress(idx(sizes, bytes(2**26)))
    with (
        tally("bad inputs"),
        memory(2**20),
        gzip.open(io.BytesIO(packed)) as file,
        pytest.raises(ValueError, match="not an idx file of unsigned bytes: "),
    ):
        named.read_idx(file)


NAMES = st.one_of(
    st.sampled_from(["image", "label", "test_image", "test_label"]),
    st.sampled_from(["../image", "/tmp/image", "a\nb", ""]),
)
DTYPES = st.one_of(arrays.scalar_dtypes(), st.just(np.dtype("u1")), st.just(object))
SHAPES = arrays.array_shapes(min_dims=0, max_dims=5, min_side=0, max_side=4)
CONTENTS = DTYPES.flatmap(lambda dtype: arrays.arrays(dtype, SHAPES, elements=st.none() if dtype is object else None))


def load_images(path):
    """Load a user's own images: a well-formed data set, or one line."""
    dataset = one_line(data.load, name=str(path))
    if dataset is None:
        return
    for split in dataset.splits.values():
        assert split.image.dtype == np.uint8 and split.image.ndim == 4
        assert split.label.shape == split.image.shape[:1] and split.label.min() >= -1


@few_or(250)
def test_npz_files(tally, examples):
    @fuzz(examples)
    @hypothesis.given(st.dictionaries(NAMES, CONTENTS, min_size=1, max_size=3), st.data())
    def check(contents, changes):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, array in contents.items():
                with archive.open(f"{name}.npy", "w") as member:
                    np.lib.format.write_array(member, array, allow_pickle=True)
        content = changes.draw(damaged(file.getvalue()))
        with tally("bad inputs"), tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "own.npz"
            path.write_bytes(content)
            load_images(path)
            assert list(Path(folder).iterdir()) == [path]

    check()


@pytest.mark.parametrize("shape", [(2**40, 28, 28), (2**62, 2**62), (3000, 9, 9)])
def test_an_npz_that_declares_more_than_it_holds(tally, tmp_path, shape):
    with (
        zipfile.ZipFile(tmp_path / "own.npz", "w") as archive,
        archive.open("image.npy", "w") as member,
    ):
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(bytes(100))
    with (
        tally("bad inputs"),
        pytest.raises(ValueError, match=r"cannot read .*own\.npz"),
    ):
        data.load(name=str(tmp_path / "own.npz"))


def test_no_input_is_executed(tally, tmp_path):
    """Neither a pickle in an archive nor a config; and no archive member is written outside."""

    class Trap:
        def __reduce__(self):
            return Path.touch, (tmp_path / "sprung",)

    trap = np.array([Trap()], dtype=object)
    pickle.loads(pickle.dumps(trap))
    (tmp_path / "sprung").unlink()  # it would work
    np.savez(tmp_path / "own.npz", image=trap)
    with zipfile.ZipFile(tmp_path / "out.npz", "w") as archive:
        archive.writestr("../sprung.npy", (tmp_path / "own.npz").read_bytes())
        archive.writestr("../sprung", b"")
    (tmp_path / "pickled.npz").write_bytes(pickle.dumps(trap))
    for name in ("own.npz", "out.npz", "pickled.npz"):
        with tally("bad inputs"), pytest.raises(ValueError, match=name):
            data.load(name=str(tmp_path / name))
    (tmp_path / "run").mkdir()
    code = f"__import__('pathlib').Path({str(tmp_path / 'sprung')!r}).touch()"
    for config in (
        code,
        f"!!python/object/apply:eval [{code!r}]",
        f'{{"seed": {code}}}',
    ):
        (tmp_path / "run" / "config.json").write_text(config)
        with tally("bad inputs"), pytest.raises(OSError, match=r"no config\.json of a run"):
            read_config(str(tmp_path / "run"))
    assert not list(tmp_path.parent.rglob("sprung*"))


def test_the_package_calls_nothing_that_executes_input():
    """No eval, exec, pickle or unpacking in the package; `np.load` only without pickles."""
    loads = 0
    for path in (ROOT / "vae_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                modules = [alias.name for alias in node.names]
                modules += [getattr(node, "module", "")]
                assert not {"pickle", "marshal", "shelve", "yaml", "tarfile"} & {*modules}
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec", "compile", "__import__")
                assert not called.endswith((".extract", ".extractall", ".unpack_archive"))
                if called == "np.load":
                    options = {option.arg: option.value for option in node.keywords}
                    assert options["allow_pickle"].value is False
                    loads += 1
    assert loads == 3


def encode(kind, size, mode):
    file = io.BytesIO()
    pixels = np.arange(size[0] * size[1], dtype=np.uint8).reshape(size)
    Image.fromarray(pixels).convert(mode).save(file, kind)
    return file.getvalue()


IMAGES = [
    encode("PNG", (6, 5), "L"),
    encode("PNG", (6, 5), "RGB"),
    encode("JPEG", (6, 5), "RGB"),
    encode("PNG", (6, 5), "P"),
    encode("GIF", (6, 5), "L"),
    encode("TIFF", (6, 5), "L"),
]
FILES = st.sampled_from(["0.png", "1.jpg", "a/0.png", "b/1.jpeg", "c/x.PNG", "a/b/c.png"])


@few_or(250)
def test_image_folders(tally, examples):
    @fuzz(examples)
    @hypothesis.given(st.dictionaries(FILES, st.sampled_from(IMAGES).flatmap(damaged), max_size=4))
    def check(files):
        with tally("bad inputs"), tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            load_images(f"{folder}/")

    check()


def png(width, height, *chunks):
    """A PNG of 8 bits per pixel whose header declares this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n"
    for kind, body in [(b"IHDR", header), *chunks, (b"IEND", b"")]:
        check = struct.pack(">I", zlib.crc32(kind + body))
        content += struct.pack(">I", len(body)) + kind + body + check
    return content


@pytest.mark.parametrize("side", [10_000, 20_000, 2**31 - 1])
def test_an_image_bomb_is_refused(tally, tmp_path, side):
    (tmp_path / "0.png").write_bytes(png(side, side, (b"IDAT", zlib.compress(b""))))
    refused = pytest.raises(ValueError, match=r"cannot read the image .*0\.png")
    with tally("bad inputs"), memory(2**22), refused:
        data.load(name=str(tmp_path))


def test_pipes_are_refused_without_waiting(tally, tmp_path):
    (tmp_path / "images").mkdir()
    os.mkfifo(tmp_path / "images" / "0.png")
    os.mkfifo(tmp_path / "own.npz")
    for name in ("images", "own.npz"):
        with tally("bad inputs"), pytest.raises(ValueError, match="there is no file|it is not a regular file"):
            data.load(name=str(tmp_path / name))


ROWS = "".join(
    json.dumps({"step": step, "epoch": step / 4, "seconds": 0.5, "train/loss": 1.5}) + "\n" for step in range(1, 5)
).encode()
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=4,
)
NONSENSE = st.one_of(
    damaged(ROWS),
    st.binary(),
    st.builds(
        lambda row: ROWS + json.dumps(row).encode() + b"\n",
        st.one_of(
            VALUES,
            st.builds(
                lambda extra: {"step": 5, "epoch": 1, "seconds": 1} | extra,
                st.dictionaries(st.sampled_from(["step", "epoch", "a"]), VALUES),
            ),
        ),
    ),
    st.sampled_from([b"[" * 100_000 + b"\n", b'{"step": ' + b"9" * 5000 + b"}\n"]),
)


def numbers_in(value):
    """The numbers in nested lists."""
    return [number for entry in value for number in numbers_in(entry)] if isinstance(value, list) else [value]


@few_or(400)
def test_metrics(tally, examples):
    """A damaged line is reported; otherwise every row up to the step is finite and kept once."""

    @fuzz(examples)
    @hypothesis.given(NONSENSE, st.integers(0, 6))
    def check(content, step):
        with tally("bad inputs"), tempfile.TemporaryDirectory() as folder:
            directory = RunDirectory(folder, {}, "")
            (directory.path / "metrics.jsonl").write_bytes(content)
            try:
                rows = one_line(read_rows, directory.path, refused=OSError)
                if rows is None:
                    with pytest.raises(OSError, match=r"line \d+ of .* is damaged"):
                        directory.rewind(step)
                    assert (directory.path / "metrics.jsonl").read_bytes() == content
                    return
                assert directory.rewind(step)
                digest = directory.log_digest()
                assert directory.rewind(step, digest)
                assert not directory.rewind(step, digest | {"rows": digest["rows"] + 1})
            finally:
                directory.close()
            kept = {(row["step"], *sorted(row)): row for row in reversed(rows) if row["step"] <= step}
            assert sorted(map(str, directory.history)) == sorted(map(str, kept.values()))  # each once
            assert read_rows(directory.path) == directory.history
            assert all(math.isfinite(number) for row in rows for v in row.values() for number in numbers_in(v))
            steps = [row["step"] for row in directory.history]
            assert steps == sorted(steps)

    check()


CHANGES = st.one_of(
    st.integers(),
    st.floats(),
    st.text(max_size=9),
    st.lists(st.integers(-3, 10**6), max_size=3).map(tuple),
    st.sampled_from([0, -1, 2**31, 2**63, 10**400, 1e39, math.nan, math.inf]),
    st.sampled_from([None, (), (0,), (2**32,) * 3, ("a",), {}, {"name": "x"}, "\0", "~"]),
)


@few_or(150)
@pytest.mark.parametrize("module", [vae, classifier])
def test_configs(tally, examples, module, monkeypatch):
    """A job is built, or one line reports what is wrong."""
    digits = functools.cache(lambda: named._digits("digits", ""))
    monkeypatch.setitem(named.DATASETS, "digits", lambda *_: digits())
    fields = [*flatten(module.get_config("digits").to_dict())]

    @fuzz(examples)
    @hypothesis.given(
        st.dictionaries(
            st.sampled_from([*fields, "data", "model", "run", "more"]),
            CHANGES,
            min_size=1,
            max_size=2,
        )
    )
    def check(changes):
        config = module.get_config("digits").to_dict()
        for field, value in sorted(changes.items(), key=lambda item: -len(item[0])):
            *sections, last = field.split(".")
            functools.reduce(dict.get, sections, config)[last] = value
        with tally("bad inputs"):
            one_line(session.build, config)

    check()


# The program, which stores its config instead of using it.
PARSE = """
import json
from absl import app
from vae_jax import main

main.train = main.use = lambda *arguments: json.dumps(arguments)
app.run(main.main, flags_parser=main.parse_flags)
"""


TEXTS = st.one_of(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9),
    st.sampled_from(["1", "-1", "1e9", "nan", "true", "1,2", "(1,", "'", "()", "9" * 5000]),
)
FIELDS = st.one_of(
    TEXTS,
    st.sampled_from([*flatten(vae.get_config().to_dict()), "data", "model.x", "."]),
)
FLAGS = st.one_of(
    st.builds("--config.{}={}".format, FIELDS, TEXTS),
    st.builds("--{}={}".format, st.sampled_from(["count", "mode", "images", "c"]), TEXTS),
    st.builds("--config.{}".format, FIELDS),
    TEXTS,
)
CONFIGS = st.sampled_from(["configs/vae.py:digits", "configs/vae.py:", "README.md", ""])


@few_or(300)
def test_command_lines(tally, forks, examples):
    """The flags are accepted, or one line reports what is wrong."""

    @fuzz(examples)
    @hypothesis.given(CONFIGS, st.lists(FLAGS, max_size=3))
    def check(config, flags):
        with tally("bad inputs"):
            process = forks("-c", PARSE, f"--config={config}", *flags)
            if process.wait() == 0:
                assert process.stderr == ""
            else:
                assert process.wait() in (1, 2)
                process.refuses(process.wait())

    check()
