"""tridrop demo --experiment: honest records, sentences that follow from them, clear errors."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import inside
from hosts import PLAIN, imported_with

import tridrop
from tridrop.commands import cli
from tridrop.commands.demo.experiments import (
    digits,
    lora,
    measures,
    overfit,
    settings,
    training,
    uncertainty,
)

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _any_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    imported_with(monkeypatch)


def experiment(name: str, out: Path, *arguments: str) -> int:
    return cli.main(
        ["demo", "--experiment", name, "--quick", "--device=cpu", "--out", str(out), *arguments]
    )


def results(out: Path, name: str) -> dict[str, Any]:
    return json.loads((out / f"{name}.json").read_text())


def check_common(found: dict[str, Any], name: str) -> None:
    assert found["experiment"] == found["options"]["experiment"] == name
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["backend"] == PLAIN
    assert found["findings"]


def check_figures(out: Path, *names: str) -> None:
    for name in names:
        assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (out / f"{name}.svg").read_text()


# ----------------------------------------------------------------------------- through the command


def test_overfit_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    threads = torch.get_num_threads()
    assert experiment("overfit", tmp_path, "--steps=4") == 0
    assert torch.get_num_threads() == threads
    found = results(tmp_path, "overfit")
    check_common(found, "overfit")
    check_figures(tmp_path, "overfit", "overfit-samples")
    said = " ".join(capsys.readouterr().out.split())
    assert all(line in said for line in found["findings"])
    assert sum(found["images"].values()) == 1797
    assert [pair["seed"] for pair in found["pairs"]] == [0, 1]
    for pair in found["pairs"]:
        none, dropout = pair["arms"]["none"], pair["arms"]["dropout"]
        for name in ("train_loss", "valid_loss", "train_accuracy", "valid_accuracy"):
            assert len(none[name]) == len(none["steps"]) == 2
            assert none[name][0] == dropout[name][0], "both start from the same weights"
        assert none["train_loss"][-1] != dropout["train_loss"][-1]
    tested = [pair["arms"]["none"]["final_accuracy"] for pair in found["pairs"]]
    assert found["summary"]["final_accuracy"]["none"] == measures.spread(tested)
    for rows in found["samples"].values():
        assert len(rows) == overfit.SHOWN
    for one in found["samples"]["wrong"]:
        assert any(one[arm]["digit"] != one["digit"] for arm in overfit.ARMS)


def test_uncertainty_writes_what_it_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    assert experiment("uncertainty", tmp_path, "--steps=4", "--seed=3") == 0
    found = results(tmp_path, "uncertainty")
    check_common(found, "uncertainty")
    check_figures(tmp_path, "uncertainty", "calibration")
    said = " ".join(capsys.readouterr().out.split())
    assert all(line in said for line in found["findings"])
    assert found["bins"] == 15
    assert found["angles"][0] == 0
    assert [one["left_out"] for one in found["networks"]] == [0, 1]
    tested = sum(one["images"]["test"] for one in found["networks"])
    for way in uncertainty.WAYS:
        assert sum(part["count"] for part in found["reliability"][way]) == tested
    for one in found["networks"]:
        assert one["images"]["test"] + one["images"]["left_out"] + 300 == 1797
        for turned in one["rotated"]:
            assert 0 <= turned["doubt"]["information"] <= turned["doubt"]["ensemble"]


def test_lora_writes_what_it_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    assert experiment("lora", tmp_path, "--steps=4") == 0
    found = results(tmp_path, "lora")
    check_common(found, "lora")
    check_figures(tmp_path, "lora")
    said = " ".join(capsys.readouterr().out.split())
    assert all(line in said for line in found["findings"])
    assert found["model"]["trained"] < found["model"]["parameters"]
    for triple in found["triples"]:
        arms = triple["arms"]
        assert arms["peft"]["valid"][0] == arms["peft_again"]["valid"][0]
        assert arms["peft"]["valid"][0] == pytest.approx(arms["tridrop"]["valid"][0], rel=1e-4)
        assert len({one["train"][1] for one in arms.values()}) == 3  # each arm has masks of its own
        assert all(len(one["seconds"]) == 4 for one in arms.values())
    memory = found["memory"]
    assert memory["peft"] > 1.2 * memory["tridrop"]
    # Two layers of seven seeds.
    assert memory["tridrop"] <= memory["tridrop_without"] + 14 * 16 <= memory["peft_without"] + 224


def test_masks_are_those_of_keep_mask(tmp_path: Path) -> None:
    assert experiment("masks", tmp_path, "--seed=5", "--p=0.3") == 0
    found = results(tmp_path, "masks")
    check_common(found, "masks")
    check_figures(tmp_path, "masks")
    structured = [one for one in found["masks"] if "noise_shape" not in one]
    squares, heads, patches, layers, words, weights = (
        torch.tensor([bit == "1" for bit in one["keep"]]).view(one["shape"]) for one in structured
    )
    x = torch.ones(squares.shape)
    first = len(found["masks"]) - 6
    seed = tridrop.fold_in(5, first)
    assert torch.equal(tridrop.drop_block2d(x, 0.3, 3, seed=seed) != 0, squares)
    assert torch.equal(heads, heads[:, :1, ::6].repeat_interleave(6, 2).expand_as(heads))
    assert patches[:, 0].all()
    assert patches[:, 1:, 0].sum(1).tolist() == [int((patches.shape[1] - 1) * 0.7)] * len(patches)
    for call in range(4):  # one of words, and of weights, is a mask of keep_mask
        rows, of_words, of_weights = (
            tridrop.fold_in(tridrop.fold_in(5, first + i), call) for i in (3, 4, 5)
        )
        keep = tridrop.keep_mask(rows, (8,), 0.3)
        assert torch.equal(layers[call], keep[:, None].expand(8, 36))
        keep = tridrop.keep_mask(of_words, (8, 36), 0.3, noise_shape=(8, 1))
        assert torch.equal(words[call], keep)
        assert torch.equal(weights[call], tridrop.keep_mask(of_weights, (8, 36), 0.3))
    for i, one in enumerate(found["masks"][:-6]):
        keep = tridrop.keep_mask(
            tridrop.fold_in(5, i), one["shape"], 0.3, noise_shape=one["noise_shape"]
        )
        assert one["keep"] == "".join(str(int(bit)) for bit in keep.flatten())


def test_same_seed_same_results_and_another_seed_others(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")

    def pairs(name: str, seed: int) -> list[Any]:
        torch.rand(seed + 1)  # the state of torch's generator does not matter
        assert experiment("overfit", tmp_path / name, "--steps=3", f"--seed={seed}") == 0
        return results(tmp_path / name, "overfit")["pairs"]

    first = pairs("a", 0)
    assert pairs("b", 0) == first
    assert pairs("c", 1)[0] == first[1]
    assert first[0] != first[1] | {"seed": 0}


# ------------------------------------------------------------------------------------------- errors


def test_an_unknown_experiment_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["demo", "--experiment", "magic"])
    assert stop.value.code == 2
    assert "overfit" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "argument"),
    [("overfit", "--layers=2"), ("overfit", "--text=a"), ("masks", "--steps=3"),
     ("uncertainty", "--model=bert"), ("lora", "--memory")],
)  # fmt: skip
def test_options_of_other_runs_are_refused(
    name: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert experiment(name, tmp_path / "out", argument) == 2
    error = capsys.readouterr().err
    assert f"--experiment {name} does not take {argument.split('=')[0]}" in error
    assert "--seed" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["overfit", "uncertainty"])
def test_missing_scikit_learn_is_told(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # importing it raises
    assert experiment(name, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert "pip install 'tridrop[demo]'" in error
    assert not (tmp_path / "out").exists()


def test_missing_peft_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # importing it raises
    assert experiment("lora", tmp_path / "out") == 2
    assert "pip install 'tridrop[hf,peft]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_masks_need_no_scikit_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("sklearn", "sklearn.datasets", "scipy.stats"):
        monkeypatch.setitem(sys.modules, name, None)
    assert experiment("masks", tmp_path) == 0


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_with_nothing_to_keep_writes_nothing(
    number: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stop(*arguments: Any) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(digits, "load", stop)
    assert experiment("overfit", tmp_path / "out") == status
    assert "nothing is written" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "number", "status"),
    [("overfit", signal.SIGTERM, 143), ("uncertainty", signal.SIGINT, 130)],
)
def test_interrupted_keeps_the_seeds_that_are_done(
    name: str,
    number: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    network, calls = digits.network, iter(range(100))
    each = 2 if name == "overfit" else 1  # networks a seed

    def stop(*arguments: Any) -> Any:
        if next(calls) == 2 * each:  # in the third seed
            signal.raise_signal(number)
        return network(*arguments)

    monkeypatch.setattr(digits, "network", stop)
    monkeypatch.setitem(settings._QUICK, "repeats", 3)
    assert experiment(name, tmp_path) == status
    said = capsys.readouterr().out
    found = json.loads((tmp_path / f"{name}.json").read_text())
    assert found["interrupted"]
    assert len(found["pairs" if name == "overfit" else "networks"]) == 2
    assert "seeds that were done, of 3" in found["findings"][-1]
    assert "over 2 seeds" in said or "2 networks, each" in said
    assert (tmp_path / f"{name}.png").exists()


def test_every_axis_and_band_of_the_figures_is_named(tmp_path: Path) -> None:
    results = Path(__file__).parents[2] / "benchmarks" / "results"
    for name, draw in (("overfit", overfit.draw_curves), ("uncertainty", uncertainty.draw)):
        found = json.loads((results / f"{name}-2026-11-21.json").read_text())
        figure = draw(found)
        assert all(axes.get_ylabel() for axes in figure.axes)
        (legend,) = figure.legends
        words = [text.get_text() for text in (*legend.get_texts(), legend.get_title())]
        assert any("from the lowest to the highest" in text for text in words)
        inside(figure)
        for axes in figure.axes:  # no bar passes what an entropy or a share can be
            for bars in axes.containers:
                low = [segment[:, 1].min() for segment in bars.lines[2][0].get_segments()]
                assert min(low) >= 0


# --------------------------------------------------------------------------------------- the parts


def test_calibration_error_by_hand() -> None:
    # (0.5, 0.75]: 0.6 and 0.7, one right: |0.5 - 0.65| = 0.15. (0.75, 1]: 0.8, 0.9 and 1.0, two
    # right: |2/3 - 0.9| = 7/30. Two of five and three of five: 0.06 + 0.14.
    confidence = torch.tensor([0.6, 0.7, 0.8, 0.9, 1.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, False, True])
    found = measures.reliability(confidence, right, bins=4)
    assert [one["count"] for one in found] == [0, 0, 2, 3]
    assert found[0]["accuracy"] is None
    assert found[3]["confidence"] == pytest.approx(0.9)
    assert measures.calibration_error(found) == pytest.approx(0.2)


def test_calibration_error_of_sure_and_right_is_0_and_of_sure_and_wrong_1() -> None:
    sure = torch.ones(7)
    for right, error in ((True, 0.0), (False, 1.0)):
        found = measures.reliability(sure, torch.full((7,), right))
        assert measures.calibration_error(found) == error


def test_an_edge_belongs_to_the_interval_below_it() -> None:
    found = measures.reliability(torch.tensor([0.25, 0.5]), torch.tensor([True, True]), bins=4)
    assert [one["count"] for one in found] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("after", "verb"),
    [([1.1, 2.1, 3.11], "raised"), ([0.9, 1.9, 2.89], "lowered"), ([1.1, 1.9, 3.1], "measurably")],
)
def test_a_sentence_claims_no_more_than_the_interval(after: list[float], verb: str) -> None:
    before = [1.0, 2.0, 3.0]
    found = measures.paired(before, after)
    spreads = measures.spread(before), measures.spread(after)
    said = measures.judge("It {} this", (*spreads, found), 1, "")
    assert verb in said
    low, high = found["interval"]
    assert (low <= 0 <= high) == (verb == "measurably")


def test_splits_are_disjoint_and_whole() -> None:
    data = digits.Images(torch.arange(50.0).view(50, 1, 1, 1), torch.arange(50))
    parts = digits.split(data, 1, 20, 10)
    assert [len(part.y) for part in parts] == [20, 10, 20]
    assert sorted(torch.cat([part.y for part in parts]).tolist()) == list(range(50))
    assert all(torch.equal(part.x.flatten().long(), part.y) for part in parts)
    assert not torch.equal(digits.split(data, 2, 20, 10)[0].y, parts[0].y)


def test_both_networks_have_the_same_weights_and_only_one_drops() -> None:
    none, dropout = digits.network(0.0, 3, CPU), digits.network(0.5, 3, CPU)
    for a, b in zip(none.parameters(), dropout.parameters(), strict=True):
        assert torch.equal(a, b)
    x = torch.rand(4, 1, 8, 8)
    assert torch.equal(none.train()(x), none(x))
    assert not torch.equal(dropout.train()(x), dropout(x))
    assert torch.equal(dropout.eval()(x), none(x))
    fallen = dropout[5].train()(torch.ones(50, 16, 4, 4)).flatten(2)
    assert torch.equal(fallen.amin(2), fallen.amax(2)), "whole channels fall"


def test_the_best_weights_are_those_of_the_lowest_validation_loss() -> None:
    model = torch.nn.Linear(1, 2)
    curves = training.Curves()
    data = digits.Images(torch.ones(3, 1), torch.ones(3, dtype=torch.int64))
    for step, bias in enumerate((0.0, 2.0, 1.0)):
        with torch.no_grad():
            model.weight.zero_()
            model.bias.copy_(torch.tensor([0.0, bias]))
        curves.note(step, model, data, data)
    assert curves.best_step == 1
    assert curves.best["bias"].tolist() == [0.0, 2.0]
    assert curves.valid_accuracy == [0.0, 1.0, 1.0]


def test_rotation_by_quarters_is_exact() -> None:
    x = torch.rand(2, 1, 8, 8)
    for quarters in range(5):
        turned = uncertainty.rotate(x, 90 * quarters)
        torch.testing.assert_close(turned, torch.rot90(x, quarters, (2, 3)))


# --------------------------------------------------------------------------- the page and its data


@pytest.mark.parametrize("name", ["overfit", "uncertainty", "lora"])
def test_the_page_says_what_the_committed_results_say(name: str) -> None:
    (path,) = sorted((ROOT / "benchmarks" / "results").glob(f"{name}-*.json"))
    found = json.loads(path.read_text())
    kind = {"overfit": overfit, "uncertainty": uncertainty, "lora": lora}[name]
    assert kind.findings(found) == found["findings"]
    page = " ".join((ROOT / "docs" / "experiments.md").read_text().split())
    for line in found["findings"]:
        assert line in page
    assert path.name in page
    own = settings._DEFAULTS[name]
    defaults = settings.Settings(name, Path(), "auto", "auto", False, **own)
    for key in ("p", "steps", "train", "valid", "samples", "rotated", "seed"):
        assert found["options"][key] == getattr(defaults, key), "made by another default run"
