"""Reports as Markdown and HTML, the programs that make them, and the tables and counts of the experiments."""

import json
import re
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from small_run import run_job

from configs import classifier
from experiments import ablations, arms, augmentation_report, iwae, launch, likelihoods, reproduce, speed, speed_peers
from vae_jax import data
from vae_jax.batch import Batch
from vae_jax.run import session
from vae_jax.run.files import read_json_lines, save_figure
from vae_jax.run.report import bullets, markdown_table, to_html

CELLS = [["what", "ours", "share"], ["a loss | b", "**18.52** ± 0.03", "5 %"], ["none", "", "-0.5 %"]]
PAGE = f"""# A <b> title

Loss `x < y` is **18.5** ± 0.1.

{bullets(["one", "two"])}

{markdown_table(CELLS)}

![A picture](p.png)

*A caption*

```sh
python -m a --b='5 % c'
```
"""


def test_tables_align_numbers_and_escape_bars():
    assert markdown_table(CELLS).splitlines() == [
        "| what | ours | share |",
        "| --- | ---: | ---: |",
        r"| a loss \| b | **18.52** ± 0.03 | 5 % |",
        "| none |  | -0.5 % |",
    ]


def test_html_is_one_escaped_page(tmp_path):
    save_figure(Figure(figsize=(1, 1)), tmp_path / "p.png")
    text = to_html(PAGE, tmp_path)
    assert "<title>A &lt;b&gt; title</title>" in text and "<h1>A &lt;b&gt; title</h1>" in text
    assert "<code>x &lt; y</code> is <strong>18.5</strong>\xa0±\xa00.1" in text
    assert '<td style="text-align:right"><strong>18.52</strong>\xa0±\xa00.03</td>' in text
    assert "<td>a loss | b</td>" in text and "5\xa0%</td>" in text
    assert "<li>one</li>" in text and "--b='5 % c'" in text
    assert '<img src="data:image/png;base64,' in text and "<em>A caption</em>" in text
    assert not re.search(r'(src|href)="(?!data:)', text)


def test_commands_name_the_variants_fields(tmp_path):
    commands = ablations.commands(tmp_path, "configs/vae.py", {"epochs": 10}, "files")
    assert commands["latent5"][-2:] == ["--config.model.latent_dim=5", "--config.data.manual_dir=files"]
    shown = launch.shell_line(commands["pooling"])
    assert shown.endswith("--config.run.likelihood_samples=0 --config.epochs=10 --config.model.pooling=True")


@pytest.fixture(scope="module")
def parts(small, tmp_path_factory):
    """The directory of a reproduction on the digits with all parts done: small runs, and an invented study."""
    path = tmp_path_factory.mktemp("post")
    shutil.copytree(small[1].path, path / "vae")
    for name in ablations.VARIANTS:
        shutil.copytree(path / "vae", path / "ablations" / name)
    config = classifier.get_config("smoke").to_dict() | {"seeds": reproduce.SEEDS}
    run_job(session.build(config), config, path / "classifier")
    study, figures = path / "augmentation", path / "augmentation" / "figures"
    figures.mkdir(parents=True)
    for name in ("arms.png", "noise.png"):
        shutil.copyfile(path / "vae" / "figures" / "samples.png", figures / name)
    for name in arms.MODELS:
        shutil.copytree(path / "vae", study / name)
    rows = [{"stage": "arm", "percentage": 20.0, "arm": arm, "accuracy": [0.8, 0.9]} for arm in arms.ARMS]
    rows += [
        {"stage": "sweep", "share": share, "scale": scale, "relabelled": 0.1}
        for share in arms.SHARES
        for scale in arms.SWEEP
    ]
    lines = [json.dumps(row | {"seconds": 60.0}) + "\n" for row in rows]
    (study / "results.jsonl").write_text("".join(lines))
    settings = {"data": "digits", "percentages": [20.0], "seeds": 2, "steps": 3, "batch_size": 128}
    (study / "settings.json").write_text(json.dumps(settings))
    (study / "summary.md").touch()
    return path


def report_of(path, name="digits"):
    commands = reproduce.plan(path, "digits", "", quick=True)
    assert all("--config.epochs=40" in command for command in commands["ablations"])  # 10 leave them above collapse
    return reproduce.Report(path, name, data.load(name="digits"), commands)


@pytest.mark.slow
def test_the_report_gives_the_numbers_of_its_parts(parts):
    text = report_of(parts).markdown()
    last = launch.last_test(parts / "vae")
    assert f"| VAE: test loss after 2 epochs, nats | **{last['test/loss']:.2f}** |" in text
    assert "| Table 5: 20 % of half B + generated images, test accuracy, % " in text
    assert "not the post's MNIST" in text and "nan" not in text
    for command in ("--config.model.pooling=True", "experiments.augmentation --data="):
        assert command in text
    spent = len(arms.ARMS) + 2 * len(arms.SWEEP)  # one minute each
    minutes = float(re.search(r"\| augmentation \| ([\d.]+) \|", text)[1])
    assert spent <= minutes < spent + 5
    page = to_html(text, parts)
    assert "<h1>The post, reproduced: digits</h1>" in page
    assert page.count("<img ") == page.count('src="data:image/png;base64,') == 7


@pytest.mark.slow
def test_the_report_shows_the_posts_numbers_for_mnist(parts, monkeypatch):
    report = report_of(parts)
    monkeypatch.setattr(report, "_name", "mnist")
    heading, loss, *_ = report._numbers()
    assert heading == ["what", "ours", "the post", "difference"] and loss[2] == "18.50"
    assert float(loss[3]) == pytest.approx(launch.last_test(parts / "vae")["test/loss"] - 18.5, abs=0.01)


@pytest.mark.slow
def test_the_report_refuses_an_unfinished_run(parts, tmp_path):
    path = shutil.copytree(parts, tmp_path / "post")
    with pytest.raises(ValueError, match="is of digits, not of mnist: give --quick"):
        report_of(path, "mnist")
    metrics = path / "ablations" / "latent2" / "metrics.jsonl"
    lines = metrics.read_text().splitlines(keepends=True)
    metrics.write_text("".join(lines[: len(lines) // 2]))
    with pytest.raises(ValueError, match="latent2 is missing or unfinished"):
        report_of(path)
    (path / "augmentation" / "summary.md").unlink()
    with pytest.raises(ValueError, match="augmentation is missing or unfinished"):
        augmentation_report.read_study(path / "augmentation")


def test_a_killed_command_is_reported(capfd):
    with pytest.raises(SystemExit) as ended:
        launch.run(["python", "-c", "import os; os.kill(os.getpid(), 9)"])
    assert ended.value.code == 137
    assert "killed by SIGKILL; the same command resumes" in capfd.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_the_launcher_reaches_its_command(forks, tmp_path, number):
    code = f"""
from experiments import launch
launch.run(["python", "-c", "import pathlib, time; pathlib.Path({str(tmp_path / "started")!r}).touch(); time.sleep(600)"])
"""
    process = forks("-c", code)
    process.wait_for((tmp_path / "started").exists)
    process.send_signal(number)
    assert f"killed by {signal.Signals(number).name}; the same command resumes" in process.ends(128 + number)


def test_a_signal_stops_the_launcher_even_if_its_command_is_at_its_end(forks, tmp_path):
    """Otherwise a study would start its next training."""
    started = tmp_path / "started"
    command = f"import pathlib, signal, time; signal.signal(15, lambda *_: exit(0)); pathlib.Path({str(started)!r}).touch(); time.sleep(600)"
    process = forks(
        "-c", f"from experiments import launch\nlaunch.run(['python', '-c', {command!r}])\nprint('went on')"
    )
    process.wait_for(started.exists)
    process.send_signal(signal.SIGTERM)
    process.ends(128 + signal.SIGTERM)
    assert "went on" not in process.stdout


@pytest.mark.parametrize(
    "model,train,expected",
    # By hand: 2 x kernel x positions, summed over the layers; in training three times that, less the first layer's.
    [("vae", False, 13.58e6), ("vae", True, 40.64e6), ("classifier", False, 1.05e6)],
)
def test_operations(model, train, expected):
    assert speed.operations(model, train) == pytest.approx(expected, rel=0.01)


def test_speed_compares_with_the_limit(capsys):
    group = "vae, training, float32"
    peers = [speed.Peer("matrix product, float32", "limit", None, 1)]
    peers += [speed.Peer(group, name, None, 1) for name in ("ours", "plain Flax", "PyTorch eager")]
    limit = 2 * speed.operations("vae", True) * 100
    rows = speed.compare(peers, [[limit, limit], [100, 100], [20, 10], [50, 40]])
    assert rows[1]["share of the limit"] == pytest.approx(0.5)
    assert [row.get("ours is") for row in rows[1:]] == [1.0, 7.5, 2.25]
    assert speed.verdict(rows) == f"{group}: ours is 7.5 times plain Flax and 2.25 times PyTorch's best"
    speed.show(rows)
    assert "50.0%" in capsys.readouterr().out
    assert len(speed.draw(rows, "title").axes) == 2


@pytest.mark.parametrize("model", speed_peers.MODELS)
def test_plain_flax_has_the_shapes_of_ours(model):
    """As many parameters and the same metrics; nothing is compiled."""

    def shapes(peer):
        image = jnp.zeros((4, *speed_peers.IMAGE_SHAPE))
        batch = Batch(image, jnp.zeros(4, jnp.int32), jnp.ones(4), jnp.arange(4))
        keys = jax.random.split(jax.random.key(0), 4)
        variables = jax.eval_shape(peer.init, keys[0])
        metrics, _ = jax.eval_shape(lambda variables: peer.objective(variables, batch, keys, True, 0), variables)
        return sum(leaf.size for leaf in jax.tree.leaves(variables)), metrics

    assert shapes(speed_peers.ours(model)) == shapes(speed_peers.plain_flax(model))


@pytest.mark.slow
def test_our_peers_run():
    work = speed_peers.random_work(4, 2)
    ours, plain = speed_peers.ours("classifier"), speed_peers.plain_flax("classifier")
    runs = [
        speed_peers.train_in_loop(ours, work),
        speed_peers.evaluate_split(ours, work),
        speed_peers.train_by_steps(plain, work),
        speed_peers.evaluate_by_steps(plain, work),
    ]
    peers = [speed.Peer("g", "ours", run, work.images) for run in runs]
    rates = speed.measure(peers, 2)
    assert [len(own) for own in rates] == [2] * 4 and np.min(rates) > 0


@pytest.mark.slow
def test_a_sweep_leaves_its_rows_and_figure(tmp_path):
    speed.sweep(1, str(tmp_path / "sweep"), batch_sizes=(4, 8), widths=(1,))
    rows = json.loads((tmp_path / "sweep.json").read_text())["rows"]
    assert [(row["width"], row["batch size"]) for row in rows] == [("1x", 4), ("1x", 8)]
    assert all(0 < row["lowest"] <= row["median"] <= row["highest"] for row in rows)
    assert (tmp_path / "sweep.png").exists()


def test_no_two_kinds_of_numbers_share_a_column():
    row = {"bound": 1.0, "bound/interval": 0.5, "kl": 2.0, "active_units": 3.0}
    rows = [
        {"likelihood": "bernoulli", "kind": "mass on {0, 1}", "bits": 0.1, **row},
        {"likelihood": "laplace", "kind": "density on [0, 1]", "scale": 0.1, **row},
        {"likelihood": "unit_gaussian", "kind": "density on [0, 1]", **row},
    ]
    found = likelihoods.tables(rows)
    assert {kind: [cells[0] for cells in table[1:]] for kind, table in found.items()} == {
        "density on [0, 1]": ["unit_gaussian", "laplace"],
        "mass on {0, 1}": ["bernoulli"],
    }
    assert found["mass on {0, 1}"][1] == ["bernoulli", "1.00 ± 0.50", "0.1000", "2.00", "3.0", ""]
    assert found["density on [0, 1]"][2] == ["laplace", "1.00 ± 0.50", "none", "2.00", "3.0", "0.1000"]


def test_each_number_of_samples_has_the_mean_of_its_seeds_beside_the_published_result():
    rows = [
        {"k": k, "nll": nll, "active_units": 20, "effective_sample_size": 10.0}
        for k, nll in [(50, 85.0), (1, 87.0), (1, 88.0), (2, 86.0)]
    ]
    cells = iwae.table(rows, "mnist")
    assert cells[1] == ["1", "87.50 ± 6.35", "20.0", "10.0", "86.76", "87.75", "87.75"]  # t(1) = 12.706
    assert [row[:2] for row in cells[2:]] == [["2", "86.00"], ["50", "85.00"]] and cells[2][4:] == ["", "", ""]
    assert iwae.table(rows, "digits")[0][-1] == "effective sample size"


@pytest.mark.slow
def test_the_importance_weighted_autoencoders(forks, tmp_path):
    """Models that were computed are kept, and their likelihoods left alone."""
    arguments = ["--data=digits", "--epochs=1", f"--workdir={tmp_path}", "--importance_samples=20", "--count=20"]
    arguments.append("--samples=2")
    assert forks("-m", "experiments.iwae", *arguments, "--seeds=3").ends(0).count("likelihood of 20") == 1
    assert forks("-m", "experiments.iwae", *arguments, "--seeds=3,4").ends(0).count("likelihood of 20") == 1
    rows = read_json_lines(tmp_path / "results.jsonl")
    assert [(row["k"], row["seed"]) for row in rows] == [(2, 3), (2, 4)]
    assert rows[0]["nll"] != rows[1]["nll"]
    assert "| 2 | " in (tmp_path / "summary.md").read_text()


@pytest.mark.slow
def test_one_network_under_every_likelihood(forks, tmp_path):
    """On the bundled digits; the second start takes the number from the first one's row, and draws what runs are there."""
    arguments = "--data=digits", "--epochs=1", "--seeds=2", f"--workdir={tmp_path}", "--likelihoods=bernoulli"
    assert forks("-m", "experiments.likelihoods", *arguments).ends(0) == ""
    summary = (tmp_path / "summary.md").read_text()
    assert "## mass on {0, 1}" in summary and "| bernoulli |" in summary
    assert (tmp_path / "likelihoods.png").stat().st_size > 10_000
    shutil.rmtree(tmp_path / "bernoulli")
    assert forks("-m", "experiments.likelihoods", *arguments).ends(0) == ""
    assert (tmp_path / "summary.md").read_text() == summary.partition("\n\n![")[0] + "\n"
    assert not (tmp_path / "bernoulli").exists()
