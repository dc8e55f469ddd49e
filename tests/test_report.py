"""The report's two forms, and the numbers that experiments count for themselves."""

import json
import re

import numpy as np
import pytest

from experiments import ablations, launch, speed
from experiments.report import (
    Code,
    Heading,
    Items,
    Picture,
    Table,
    Text,
    to_html,
    to_markdown,
)
from vae_jax.figures import mosaic
from vae_jax.rundir import save_figure

BLOCKS = [
    Heading("A <b> title", 1),
    Text("Loss `x < y` is **18.5**."),
    Items(["one", "two"]),
    Table([["what", "ours"], ["loss", "**18.52** ± 0.03"]], "A table"),
    Picture("p.png", "A picture"),
    Code("python -m a --b='c d'"),
]


def test_markdown():
    text = to_markdown(BLOCKS)
    assert (
        "# A <b> title\n\nLoss `x < y` is **18.5**.\n\n- one\n- two\n\n**A table**"
        in text
    )
    assert "| what | ours |\n| --- | --- |\n| loss | **18.52** ± 0.03 |" in text
    assert '<img src="p.png"' in text and "```sh\npython -m a --b='c d'\n```" in text


def test_html_is_one_file_and_escaped(tmp_path):
    from matplotlib.figure import Figure

    save_figure(Figure(figsize=(1, 1)), tmp_path / "p.png")
    text = to_html(BLOCKS, tmp_path)
    assert "<h1>A &lt;b&gt; title</h1>" in text and "<code>x &lt; y</code>" in text
    assert "<td class=number><strong>18.52</strong> ± 0.03</td>" in text
    assert 'src="data:image/png;base64,' in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_mosaic():
    image = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) * np.ones(
        (1, 2, 2, 1), np.float32
    )
    assert mosaic(image, 2)[..., 0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 0, 0]] * 2


def test_commands_name_the_variants_fields(tmp_path):
    commands = ablations.commands(tmp_path, "configs/vae.py", 10, "files")
    assert commands["latent5"][-2:] == [
        "--config.model.latent_dim=5",
        "--config.data.manual_dir=files",
    ]
    assert launch.shown(commands["pooling"]).endswith(
        "--config.epochs=10 --config.model.pooling=True"
    )


@pytest.mark.parametrize(
    "model,train,expected",
    # By hand: 2 x kernel x places, summed over the layers; three times that, less the first layer's share, in training.
    [("vae", False, 13.58e6), ("vae", True, 40.64e6), ("classifier", False, 1.05e6)],
)
def test_operations(model, train, expected):
    assert speed.operations(model, train) == pytest.approx(expected, rel=0.01)


def test_speed_compares_with_the_limit():
    peers = [
        speed.Peer("matrix product, float32", "limit", None, 1),
        speed.Peer("vae, training, float32", "ours", None, 1),
        speed.Peer("vae, training, float32", "plain Flax", None, 1),
        speed.Peer("vae, training, float32", "PyTorch eager", None, 1),
    ]
    limit = 2 * speed.operations("vae", True) * 100
    rows = speed.compare(peers, [[limit, limit], [100, 100], [20, 10], [50, 40]])
    assert rows[1]["share of the limit"] == pytest.approx(0.5)
    assert [row.get("ours is") for row in rows[1:]] == [1.0, 7.5, 2.25]
    assert (
        speed.verdict(rows)
        == "vae, training, float32: ours is 7.5 times plain Flax and 2.25 times PyTorch's best"
    )


def test_our_peers_run():
    images = np.zeros((8, 28, 28, 1), np.uint8), np.zeros(8, np.int32)
    make_network, plain, make_objective, _ = speed.MODELS["classifier"]
    network = make_network((28, 28, 1))
    for function, net in [
        (speed.train_ours, network),
        (speed.evaluate_ours, network),
        (speed.train_plain, plain),
        (speed.evaluate_plain, plain),
    ]:
        run = function(net, make_objective(net), *images, 4, 2)
        peer = speed.Peer("g", "ours", run, 8)
        assert len(speed.measure([peer], 2)[0]) == 2


def test_a_sweep_leaves_its_rows_and_figure(tmp_path):
    speed.sweep(1, str(tmp_path / "sweep"), batch_sizes=(4, 8), widths=(1,))
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["width"], row["batch size"]) for row in rows] == [("1x", 4), ("1x", 8)]
    assert all(0 < row["lowest"] <= row["median"] <= row["highest"] for row in rows)
    assert (tmp_path / "sweep.png").exists()
