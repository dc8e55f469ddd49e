"""The report, its two forms, and the numbers that experiments count for themselves."""

import json
import re
import shutil

import numpy as np
import pytest
from small_run import run_job, small_job

from configs import classifier
from experiments import ablations, augmentation, launch, reproduce, speed
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
from vae_jax import data
from vae_jax.figures import mosaic
from vae_jax.run import session
from vae_jax.run.files import save_figure

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
    assert "<td class=number><strong>18.52</strong>\xa0±\xa00.03</td>" in text
    assert 'src="data:image/png;base64,' in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_mosaic():
    image = np.arange(3, dtype=np.float32).reshape(3, 1, 1, 1) * np.ones(
        (1, 2, 2, 1), np.float32
    )
    assert mosaic(image, 2)[..., 0].tolist() == [[0, 0, 1, 1]] * 2 + [[2, 2, 0, 0]] * 2


def test_commands_name_the_variants_fields(tmp_path):
    commands = ablations.commands(tmp_path, "configs/vae.py", {"epochs": 10}, "files")
    assert commands["latent5"][-2:] == [
        "--config.model.latent_dim=5",
        "--config.data.manual_dir=files",
    ]
    assert launch.shown(commands["pooling"]).endswith(
        "--config.epochs=10 --config.model.pooling=True"
    )


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The directory of a reproduction on the digits, its parts done: small runs, and a study that was made up."""
    path = tmp_path_factory.mktemp("post")
    run_job(*small_job(drawn=True), path / "vae")
    for name in ablations.VARIANTS:
        shutil.copytree(path / "vae", path / "ablations" / name)
    config = classifier.get_config("smoke").to_dict() | {"seeds": reproduce.SEEDS}
    run_job(session.build(config), config, path / "classifier")
    study, figures = path / "augmentation", path / "augmentation" / "figures"
    figures.mkdir(parents=True)
    for name in ("arms.png", "noise.png"):
        shutil.copyfile(path / "vae" / "figures" / "samples.png", figures / name)
    for name in ("classifier", "vae", "sharp"):
        shutil.copytree(path / "vae", study / name)
    rows = [
        {"stage": "arm", "percentage": 20.0, "arm": arm, "accuracy": [0.8, 0.9]}
        for arm in augmentation.ARMS
    ] + [
        {"stage": "sweep", "share": share, "scale": scale, "relabelled": 0.1}
        for share in augmentation.SHARES
        for scale in augmentation.SWEEP
    ]
    (study / "results.jsonl").write_text(
        "".join(json.dumps(row | {"seconds": 60.0}) + "\n" for row in rows)
    )
    settings = {"percentages": [20.0], "seeds": 2, "steps": 3, "batch_size": 128}
    (study / "settings.json").write_text(json.dumps(settings | {"data": "digits"}))
    (study / "summary.md").touch()
    return path


def report_of(path, name="digits"):
    commands = reproduce.plan(path, "digits", "", quick=True)
    return reproduce.Report(path, name, data.load(name="digits"), commands)


def test_the_report_says_what_the_parts_hold(parts):
    blocks = report_of(parts).blocks()
    text = to_markdown(blocks)
    last = launch.last_test(parts / "vae")
    assert (
        f"| VAE: test loss after 2 epochs, nats | **{last['test/loss']:.2f}** |" in text
    )
    assert "| Table 5: 20 % of half B + generated images, test accuracy, % " in text
    assert "not the post's MNIST" in text and "nan" not in text
    for command in ("--config.model.pooling=True", "experiments.augmentation --data="):
        assert command in text
    spent = len(augmentation.ARMS) + 2 * len(augmentation.SWEEP)  # a minute each
    minutes = float(re.search(r"\| augmentation \| ([\d.]+) \|", text)[1])
    assert spent <= minutes < spent + 5
    assert "<h1>The post, reproduced: digits</h1>" in to_html(blocks, parts)


def test_the_report_takes_no_unfinished_run(parts, tmp_path):
    path = shutil.copytree(parts, tmp_path / "post")
    metrics = path / "ablations" / "latent2" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match="latent2 is missing or not finished"):
        report_of(path).blocks()
    with pytest.raises(ValueError, match="is of digits, not of mnist: give --quick"):
        report_of(path, "mnist")


def test_a_killed_part_is_told(capfd):
    killed = "import os; os.kill(os.getpid(), 9)"
    with pytest.raises(SystemExit) as ended:
        launch.run(["python", "-c", killed])
    assert ended.value.code == 137
    assert "ended by SIGKILL: the same command continues" in capfd.readouterr().err


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
