"""The study of few labels: its label draws, label spreading where the answer is known, its tables."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from experiments import label_report as report
from experiments import label_spectrum
from experiments.label_spectrum import FAMILIES, METHODS, Spectrum
from vae_jax.batch import Dataset, Split

SETTINGS = {"data": "mnist", "draws": 3, "labels": [2, 4], "epochs": 1, "steps": 5, "batch_size": 8, "vae_epochs": 1}


def two_clusters(n=60):
    """Dark images of class 0 and bright ones of class 1, each a chain along which neighbours differ little."""
    rng = np.random.default_rng(0)
    label = np.arange(n) % 2
    level = np.where(label == 0, 40, 200)[:, None, None, None]
    image = level + rng.integers(-20, 21, (n, 4, 4, 1))
    return Split(image.astype(np.uint8), label.astype(np.int32))


@pytest.fixture
def spectrum(tmp_path):
    splits = {"train": two_clusters(), "test": two_clusters(30)}
    return Spectrum(tmp_path, SETTINGS, Dataset(splits, 2, True), "")


def test_spreading_labels_one_of_each_cluster_labels_all(spectrum):
    assert spectrum.spread(2, codes=False)["accuracy"] == [1.0] * 3
    assert (spectrum._spread(2, 0, False).transduction_ == two_clusters().label).all()


def test_test_images_have_neighbours_of_their_own(tmp_path):
    """Also if they are as many as the training images, and in another order."""
    test = two_clusters()
    order = np.argsort(test.label, kind="stable")
    splits = {"train": two_clusters(), "test": Split(test.image[order], test.label[order])}
    spectrum = Spectrum(tmp_path, SETTINGS, Dataset(splits, 2, True), "")
    assert spectrum.spread(2, codes=False)["accuracy"] == [1.0] * 3


def test_every_draw_spreads_its_own_labels(spectrum, monkeypatch):
    import sklearn.semi_supervised

    given = []
    fit = sklearn.semi_supervised.LabelSpreading.fit
    monkeypatch.setattr(
        sklearn.semi_supervised.LabelSpreading, "fit", lambda self, x, y: (given.append(y), fit(self, x, y))[1]
    )
    spectrum.spread(4, codes=False)
    assert len(given) == 3
    for draw, label in enumerate(given):
        np.testing.assert_array_equal(label, spectrum.hidden(4, draw))


def test_the_graph_joins_neighbours_in_both_directions(spectrum):
    among, to_test = spectrum._graph(False)
    assert among.shape == (60, 60) and to_test.shape == (60, 30)
    assert (among != among.T).nnz == 0 and among.diagonal().sum() == 0
    assert (np.asarray(to_test.sum(axis=0)) == 10).all()


def test_every_draw_trains_on_its_own_labels_alone(spectrum, monkeypatch):
    """Training takes the labels that a draw keeps, and pseudo-labels only where the prediction is confident."""
    seen = {}

    class Recorder:
        def __call__(self, image, label, rows, augmented):
            seen["rows"], seen["label"] = rows, np.broadcast_to(label, (3, 60))

        def make_predict(self, split):
            count = len(split.label)
            prediction = {
                "prediction": np.ones((3, count), int),
                "confidence": np.tile(np.arange(count) % 3 / 2, (3, 1)),
            }
            return lambda variables: prediction

    monkeypatch.setattr(spectrum, "_trainer", Recorder)
    assert spectrum.classifier(4)["accuracy"] == [0.5] * 3
    for draw, rows in enumerate(seen["rows"]):
        np.testing.assert_array_equal(rows, np.flatnonzero(spectrum.hidden(4, draw) >= 0))
    spectrum.classifier(4, pseudo_labels=True)
    for draw, rows in enumerate(seen["rows"]):
        hidden = spectrum.hidden(4, draw)
        confident = np.arange(60) % 3 == 2
        np.testing.assert_array_equal(rows, np.flatnonzero((hidden >= 0) | confident))
        np.testing.assert_array_equal(seen["label"][draw], np.where(hidden >= 0, hidden, 1))


def test_a_conditional_vae_classifies_by_bayes_rule(spectrum, monkeypatch, tmp_path):
    """With log p(x | y) of -1 for the image's own label and -3 for the other one, p(x) is their mean."""
    own = two_clusters(30).label
    fake = SimpleNamespace(log_likelihood=lambda image, samples, label: np.where(own == label, -1.0, -3.0))
    monkeypatch.setattr(label_spectrum.vae_jax, "load", lambda path, checkpoint: fake)
    found = spectrum._by_bayes(tmp_path)
    nll = -math.log((math.exp(-1) + math.exp(-3)) / 2)
    assert found == pytest.approx({"accuracy": 1.0, "nll_given_label": 1.0, "nll": nll})


def test_the_tables_hold_means_intervals_and_paired_differences():
    def row(method, accuracy, **fields):
        return {"stage": method, "labels": 2, "accuracy": accuracy, "seconds": 60.0, **fields}

    rows = [
        row("label spreading, pixels", [0.8, 0.9, 0.85]),
        row("label spreading, VAE's codes", [0.9, 1.0, 0.95]),
        *(row("M2", accuracy, draw=draw, bound=90.0 + draw) for draw, accuracy in enumerate([0.5, 0.6, 0.7])),
        row("classifier, shifted", [0.9, 0.9, 0.9]),
        row("conditional VAE, Bayes' rule", 0.98, bound=94.0, nll=89.0) | {"labels": -1},
    ]
    found = report.tables(rows, SETTINGS)
    plain, shifted, pairs, nats, minutes = found.values()
    by_name = {cells[0]: cells[1:] for cells in plain}
    assert by_name["M2"] == ["60.00 ± 24.84", "", ""]  # t(2) = 4.303, standard deviation 10
    assert "*M2 in Pyro's tutorial*" in by_name and [cells[0] for cells in shifted] == ["method", "classifier, shifted"]
    assert pairs[1] == ["label spreading, VAE's codes - label spreading, pixels", "+10.00 ± 0.00", ""]
    assert {cells[0]: cells[1:] for cells in nats[1:]} == {
        "M2": ["91.00 ± 2.48", "", ""],
        "conditional VAE, Bayes' rule": ["", "", "89.00"],
    }
    assert {cells[0]: cells[1] for cells in minutes[1:]}["M2"] == "3.0"
    _, _, pairs, *_ = report.tables([*rows, row("classifier", [0.7])], SETTINGS).values()
    assert ["M2 - classifier", "-20.00 (1 of 3 draws)", ""] in pairs
    begun = report.tables(rows[:4], SETTINGS)["Test accuracy in %, images as they are"]
    assert ["M2", "55.00 ± 63.53 (2 of 3 draws)", "", ""] in begun
    figure = report.draw(rows, SETTINGS)
    assert [ax.get_title() for ax in figure.axes] == ["Images as they are", "Images shifted and rotated"]


def test_a_missing_draw_is_named_since_differences_are_paired():
    rows = [{"stage": "M2", "labels": 2, "accuracy": 0.5, "draw": draw, "seconds": 1.0} for draw in (0, 2)]
    with pytest.raises(ValueError, match="lacks draw 1 of M2 with 2 labels: compute it with --methods='M2'"):
        report.by_method(rows)


def test_choices_that_cannot_be_computed_are_refused_before_the_others_are():
    label_spectrum.check_chosen([*METHODS, *FAMILIES], [10, 388, -1], 500)
    label_spectrum.check_chosen([*METHODS], [499], 500)
    with pytest.raises(
        ValueError, match="has 389 of 500, but M2 takes 112 unlabelled images in a batch: give at most 388"
    ):
        label_spectrum.check_chosen(["classifier", "M2"], [10, 389, -1], 500)
    with pytest.raises(ValueError, match="--labels=all leaves nothing to compute"):
        label_spectrum.check_chosen(["label spreading, pixels", "classifier, pseudo-labels"], [-1], 500)


def test_pseudo_labels_start_from_the_classifier_of_the_method_before(spectrum, monkeypatch):
    trained = []
    train = label_spectrum.Trainer.__call__
    monkeypatch.setattr(label_spectrum.Trainer, "__call__", lambda *given: (trained.append(given[4]), train(*given))[1])
    spectrum.classifier(4)
    spectrum.classifier(4, pseudo_labels=True)
    assert trained == [False, False]


def test_all_labels_are_used_once_and_only_where_they_are_defined(monkeypatch):
    computed = []
    monkeypatch.setattr(
        label_spectrum, "compute_once", lambda study, method, _, **cell: computed.append((method, cell))
    )
    monkeypatch.setattr(report, "write_summary", lambda *_: None)
    study, chosen = SimpleNamespace(path=Path(), rows=[]), ["classifier", "label spreading, pixels", "M2"]
    label_spectrum.run_study(
        study,
        SETTINGS | {"labels": [4, -1]},
        Dataset({"train": two_clusters(), "test": two_clusters(30)}, 2, True),
        "",
        chosen,
    )
    assert computed[:3] == [("classifier", {"labels": 4}), ("classifier", {"labels": -1}), (chosen[1], {"labels": 4})]
    cells = [(cell["labels"], cell["draw"]) for _, cell in computed[3:]]
    assert cells == [(4, 0), (-1, 0), (4, 1), (4, 2)]


@pytest.mark.parametrize("labels", [4, -1])
def test_a_family_hides_labels_and_keeps_its_own_fields(spectrum, monkeypatch, labels):
    given = {}
    monkeypatch.setattr(spectrum, "_run", lambda config, run, fields: given.update(fields))
    monkeypatch.setattr(label_spectrum.launch, "last_test", lambda run: {"test/accuracy": 0.5, "seconds": 1.0})
    spectrum._settings = SETTINGS | {
        "precision": "float32",
        "alpha": 10.0,
        "epochs": {"sparse labels, published loss": 1},
    }
    row = spectrum.family("sparse labels, published loss", labels, 2)
    assert row["accuracy"] == 0.5 and row["objective.alpha"] == 10.0
    assert given["objective.charge"] is False and given["seed"] == 2
    assert [given.get(f"data.{name}") for name in ("labelled", "label_seed")] == [labels, 2]
    assert given["data.labelled_per_batch"] == max(labels, 0)


def test_methods_with_a_generative_model_are_known():
    names = [name for name in (*METHODS, *FAMILIES) if report.is_generative(name)]
    expected = (
        "linear probe, VAE's codes; label spreading, VAE's codes; classifier, shifted, labels spread over VAE's codes; "
    )
    expected += "sparse labels; sparse labels, published loss; M2; M1 + M2; conditional VAE, Bayes' rule"
    assert names == expected.split("; ")
