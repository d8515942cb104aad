"""tridrop demo: equal twins, honest records, complete results, clear errors."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from demo_helpers import TINY, parse, settled  # noqa: F401
from figures import inside
from hosts import PLAIN

import tridrop.commands.demo
from tridrop.commands.demo import architectures, model, options, plan, report, text, train

pytestmark = pytest.mark.usefixtures("settled")


def demo(out: Path, *arguments: object) -> int:
    return tridrop.commands.demo.run(
        parse(*TINY, "--steps=4", "--eval-every=2", "--out", out, *arguments)
    )


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def examples(windows: torch.Tensor, asked: options.Options | None = None) -> torch.Tensor:
    return architectures.examples(asked or tiny(), windows, torch.Generator().manual_seed(0))


def tiny(**changes: Any) -> options.Options:
    return replace(options.resolve(parse(*TINY)), **changes)


# ------------------------------------------------------------------------------------- the twins


def twins(**changes: Any) -> tuple[model.GPT, model.GPT]:
    eager = model.GPT(tiny(**changes), fused=False)
    fused = model.GPT(tiny(**changes), fused=True)
    assert list(eager.state_dict()) == list(fused.state_dict())
    fused.load_state_dict(eager.state_dict())
    return eager, fused


def test_twins_agree_at_p_0_in_outputs_and_gradients() -> None:
    eager, fused = twins(p=0.0, attention_p=0.0, layers=2)
    windows = torch.randint(256, (3, 9))
    torch.testing.assert_close(fused(windows[:, :-1]), eager(windows[:, :-1]))
    for twin in (eager, fused):
        model.loss_of(twin, examples(windows)).backward()
    for (name, a), b in zip(eager.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(b.grad, a.grad, msg=lambda m, name=name: f"{name}: {m}")


def test_twins_agree_in_eval_mode_and_only_there() -> None:
    eager, fused = twins(p=0.5)
    tokens = torch.randint(256, (3, 8))
    with torch.no_grad():
        assert not torch.allclose(fused(tokens), eager(tokens))
        torch.testing.assert_close(fused.eval()(tokens), eager.eval()(tokens))


def test_dropout_acts_after_the_embeddings_and_both_branches_of_each_block() -> None:
    """At p next to 1 next to nothing is kept: every logit of a tied head is that of a zero."""
    for twin in twins(p=0.999999):
        logits = twin(torch.randint(256, (2, 8)))
        assert torch.equal(logits, torch.zeros_like(logits))


def test_dropout_acts_on_attention() -> None:
    for twin in twins(p=0.0, attention_p=0.5):
        tokens = torch.randint(256, (2, 8))
        assert not torch.allclose(twin(tokens), twin(tokens))
        assert torch.equal(twin.eval()(tokens), twin(tokens))


def test_no_dropout_is_p_0() -> None:
    plain = model.GPT(tiny(p=0.5, attention_p=0.5), fused=False, drops=False)
    tokens = torch.randint(256, (2, 8))
    assert torch.equal(plain(tokens), plain(tokens))


# -------------------------------------------------------------------- architectures of transformers


HUB = ["gpt2", "bert"]


@pytest.mark.parametrize("name", HUB)
def test_architectures_of_transformers_learn_and_report_their_swap(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    assert demo(tmp_path, "--model", name, "--layers=2") == 0
    found = results(tmp_path)
    assert found["options"]["model"] == name
    assert found["swap"]["counts"]["left"] == 0
    assert found["swap"]["counts"]["fused"] >= 6
    costs = found["swap"]["verification"]["cost"]
    assert costs["after"]["operators"] < costs["before"]["operators"]
    assert costs["before"]["dropouts"] == costs["after"]["dropouts"] == 1 + 3 * 2
    runs = found["runs"]
    assert runs["tridrop"]["saved_bytes"] < runs["eager"]["saved_bytes"]
    first = torch.tensor([[run["train"][0], run["valid"][0]] for run in runs.values()])
    torch.testing.assert_close(first, first[:1].expand_as(first))
    assert first[0, 0] == pytest.approx(math.log(256), rel=0.2)
    assert len({run["train"][-1] for run in runs.values()}) == len(runs)
    assert (tmp_path / "demo.png").exists()
    shown = capsys.readouterr().out
    assert "tridrop.swap" in shown
    assert "saved for backward" in shown


@pytest.mark.parametrize("name", HUB)
def test_swapped_twins_have_the_same_function(name: str) -> None:
    pytest.importorskip("transformers")
    asked = tiny(model=name, p=0.5, attention_p=0.5)
    eager, nothing = architectures.build(asked, fused=False)
    fused, swapped = architectures.build(asked, fused=True)
    plain, _ = architectures.build(asked, fused=False, drops=False)
    assert nothing is None
    assert swapped is not None
    assert not any(hasattr(type(m), "_tridrop_base") for m in eager.modules())
    for twin in (fused, plain):
        twin.load_state_dict(eager.state_dict())
    tokens = torch.randint(256, (2, 8))
    assert torch.equal(plain.train()(tokens), plain(tokens))
    for twin in (eager, fused):
        assert not torch.equal(twin.train()(tokens), twin(tokens))
        torch.testing.assert_close(twin.eval()(tokens), plain.eval()(tokens))


def test_bert_guesses_what_it_does_not_see_and_others_the_next_byte() -> None:
    windows = torch.randint(256, (200, 9))
    inputs, targets = examples(windows).unbind(1)
    assert torch.equal(inputs, windows[:, :-1])
    assert torch.equal(targets, windows[:, 1:])
    inputs, targets = examples(windows, tiny(model="bert")).unbind(1)
    hidden = inputs == architectures.MASK
    assert hidden.any(1).all()
    assert hidden.float().mean() == pytest.approx(0.15 + 0.85**8 / 8, abs=0.04)
    assert torch.equal(torch.where(hidden, targets, inputs), windows[:, :-1])
    assert (targets[~hidden] == architectures.IGNORED).all()


def test_missing_transformers_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find = architectures.importlib.util.find_spec
    monkeypatch.setattr(
        architectures.importlib.util,
        "find_spec",
        lambda n: None if n == "transformers" else find(n),
    )
    assert demo(tmp_path / "out", "--model=bert") == 2
    assert "pip install 'tridrop[hf]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_transformers_that_cannot_be_imported_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")

    def broken(name: str) -> None:
        raise ModuleNotFoundError("Could not import module 'X'.\nMore")

    monkeypatch.setattr(architectures.importlib, "import_module", broken)
    assert demo(tmp_path, "--model=gpt2") == 2
    assert "cannot be imported: Could not import module 'X'." in capsys.readouterr().err


# --------------------------------------------------------------------------------- a run's record


def test_outputs_and_the_fields_of_the_json(tmp_path: Path) -> None:
    assert demo(tmp_path) == 0
    assert (tmp_path / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "demo.svg").read_text()
    found = results(tmp_path)
    assert found["options"]["steps"] == 4
    assert found["options"]["dim"] == 16
    assert found["versions"]["torch"] == torch.__version__.split("+")[0] or (
        found["versions"]["torch"] == torch.__version__
    )
    assert found["device"]["type"] == "cpu"
    assert found["backend"] == PLAIN
    assert found["text"]["name"] == "pydoc_data.topics"
    assert found["steps"] == [0, 2, 4]
    assert not found["interrupted"]
    assert list(found["runs"]) == ["none", "eager", "eager_2", "eager_3", "tridrop"]
    for run in found["runs"].values():
        assert len(run["train"]) == len(run["valid"]) == 3
        assert run["valid_best"] == min(run["valid"])
        assert run["valid_final"] == run["valid"][-1]
        assert run["step_time_ratio"]["median"] > 0
        assert run["saved_bytes"] > 0
        assert run["peak_bytes"] is None
    assert found["runs"]["eager"]["step_time_ratio"]["median"] == 1
    assert found["noise"]["tridrop_to_eager"] > 0
    assert found["steps_planned"] == 4
    assert found["steps_scaled"] is None
    for what in ("train", "valid"):
        last = found["noise"][f"{what}_final"]
        ends = [found["runs"][name][what][-1] for name in train.EAGER]
        assert (last["eager_low"], last["eager_high"]) == (min(ends), max(ends))
        assert last["tridrop"] == found["runs"]["tridrop"][what][-1]
    assert found["options"]["model"] == "block"
    assert found["swap"] is None


def test_all_runs_start_alike_and_part(tmp_path: Path) -> None:
    demo(tmp_path)
    runs = results(tmp_path)["runs"].values()
    first = torch.tensor([[run["train"][0], run["valid"][0]] for run in runs])
    torch.testing.assert_close(first, first[:1].expand_as(first))
    assert first[0, 0] == pytest.approx(math.log(256), rel=0.2)
    assert len({run["train"][-1] for run in runs}) == len(runs)


def test_same_seed_same_curves_and_another_seed_others(tmp_path: Path) -> None:
    def curves(name: str, seed: int) -> list[Any]:
        torch.rand(seed + 1)  # what was drawn before makes no difference
        demo(tmp_path / name, "--seed", seed)
        return [[run["train"], run["valid"]] for run in results(tmp_path / name)["runs"].values()]

    first = curves("a", 1)
    assert curves("b", 1) == first
    assert curves("c", 2) != first


def test_backends_train_alike(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"  # there in Triton's interpreter
    losses = []
    for backend in ("triton", PLAIN):
        assert demo(tmp_path / backend, "--device", device, "--backend", backend) == 0
        found = results(tmp_path / backend)
        assert found["backend"] == backend
        losses.append(found["runs"]["tridrop"]["train"] + found["runs"]["tridrop"]["valid"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_a_run_trains_as_if_it_were_alone() -> None:
    asked = tiny(steps=3, eval_every=3)
    tokens, valid = text.split(text.reference_text(), 200, 100)

    def losses(only: str | None) -> list[float]:
        planned = plan.Plan(asked.steps, asked.eval_every)
        runs = train.make_runs(asked, torch.device("cpu"), planned)
        runs = [r for r in runs if only in (None, r.name)]
        record = train.Record()
        train.train(runs, tokens, valid, asked, planned, record, Silent())
        return record.train("tridrop")

    assert losses("tridrop") == losses(None)


class Silent:
    def planned(self, changed: plan.Plan) -> None: ...

    def stepped(self, run: train.Run, step: int, loss: float) -> None: ...

    def evaluated(self, record: train.Record) -> None: ...


def test_tridrop_saves_no_mask_for_backward() -> None:
    """Eager's masks are fp32 on a CPU; tridrop's seeds are 16 bytes a call."""

    def saved(asked: options.Options) -> dict[str, int]:
        runs = train.make_runs(asked, torch.device("cpu"), plan.Plan(1, 1))
        windows = torch.randint(256, (asked.batch, asked.context + 1))
        for run in runs:
            run.measure(examples(windows))
        return {run.name: run.saved_bytes for run in runs}

    asked = tiny(p=0.5, attention_p=0.0)
    calls, elements = 1 + 2 * asked.layers, asked.batch * asked.context * asked.dim
    found = saved(asked)
    for name in train.EAGER:
        assert found[name] == found["none"] + 4 * calls * elements
    assert found["tridrop"] <= found["none"] + 16 * calls
    # Eager attention with dropout keeps a mask and the scores.
    found = saved(replace(asked, attention_p=0.5))
    assert found["eager"] > found["none"] + 4 * calls * elements
    assert found["tridrop"] <= found["none"] + 16 * (calls + asked.layers)


@pytest.mark.parametrize("name", options.MODELS)
def test_the_memory_switch_keeps_less_and_trains_alike(tmp_path: Path, name: str) -> None:
    if name != "block":
        pytest.importorskip("transformers")
    for switch in ((), ("--memory",)):
        assert demo(tmp_path / str(len(switch)), "--model", name, *switch) == 0
    without, switched = (results(tmp_path / folder)["runs"] for folder in "01")
    assert without["tridrop"]["label"] == "tridrop"
    assert switched["tridrop"]["label"] == "tridrop, memory"
    # Widths 64 and 16: the inputs of the second linear layer alone are 2 x 8 x 64 numbers.
    assert switched["tridrop"]["saved_bytes"] < without["tridrop"]["saved_bytes"] - 4 * 2 * 8 * 64
    assert switched["eager"]["saved_bytes"] == without["eager"]["saved_bytes"]
    exact = name != "gpt2"  # its GELU, written in Python there, becomes an op
    for part in ("train", "valid"):
        expected = without["tridrop"][part]
        assert switched["tridrop"][part] == (expected if exact else pytest.approx(expected))


def test_the_threads_are_the_faster_and_nothing_else_changes() -> None:
    asked = tiny()
    (run, *_) = train.make_runs(asked, torch.device("cpu"), plan.Plan(1, 1))
    before = [w.clone() for w in run.model.parameters()]
    generators = [state.clone() for state in run._generators]
    torch.set_num_threads(3)
    assert run.faster_threads(examples(torch.randint(256, (2, 9)))) in (1, 3)
    assert torch.get_num_threads() == 3
    for weight, was in zip(run.model.parameters(), before, strict=True):
        assert torch.equal(weight, was)
        assert weight.grad is None
    assert all(map(torch.equal, run._generators, generators))


def test_the_band_of_eager_runs_is_drawn_and_named(tmp_path: Path) -> None:
    assert demo(tmp_path) == 0
    figure = report._draw(results(tmp_path))
    (axes,) = figure.axes
    assert len(axes.collections) == 2  # validation and training
    (legend,) = figure.legends
    words = [text.get_text() for text in legend.get_texts()]
    assert "eager dropout, 3 draws of masks" in words
    inside(figure)


def test_windows_cover_the_slice_once() -> None:
    windows = train.windows_of(torch.arange(21), 5)
    assert windows[:, 1:].flatten().tolist() == list(range(1, 21))
    assert train.windows_of(torch.arange(21), 5, limit=2)[:, 0].tolist() == [0, 15]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_leaves_the_results_so_far(
    number: int,
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    step, calls = train.Run.step, iter(range(100))
    before = signal.getsignal(signal.SIGTERM)

    def interrupted(run: train.Run, tokens: torch.Tensor) -> float:
        if next(calls) == 17:  # in the middle of the fourth step of five runs
            signal.raise_signal(number)
        return step(run, tokens)

    monkeypatch.setattr(train.Run, "step", interrupted)
    assert demo(tmp_path) == status
    assert signal.getsignal(signal.SIGTERM) is before
    found = results(tmp_path)
    assert found["interrupted"]
    assert found["steps_done"] == 2
    assert found["steps"] == [0, 2]
    assert (tmp_path / "demo.png").exists()
    assert (tmp_path / "demo.svg").exists()
    assert "up to step 2" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupt_before_anything_was_measured(
    number: int, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(run: train.Run, tokens: torch.Tensor) -> None:
        signal.raise_signal(number)

    monkeypatch.setattr(train.Run, "measure", interrupted)
    assert demo(tmp_path) == status
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("again", [False, True])
def test_a_sigterm_while_the_results_are_written(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also a second one: whoever sends them need not know how long that takes."""
    step, write = train.Run.step, report.write_json

    def stepped(run: train.Run, tokens: torch.Tensor) -> float:
        if again:
            signal.raise_signal(signal.SIGTERM)
        return step(run, tokens)

    def written(result: dict[str, Any], folder: Path) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return write(result, folder)

    monkeypatch.setattr(train.Run, "step", stepped)
    monkeypatch.setattr(report, "write_json", written)
    assert demo(tmp_path) == 143
    assert results(tmp_path)["steps_done"] == (0 if again else 4)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["demo.png", "demo.svg", "results.json"]


def test_a_sigterm_to_a_process(tmp_path: Path) -> None:
    """From outside, as a batch system sends it."""
    arguments = [*TINY, "--steps=100000", "--eval-every=10", f"--out={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "-m", "tridrop.commands.demo", *arguments],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "Ctrl-C" in line:
            break
    process.terminate()
    rest, _ = process.communicate(timeout=200)
    assert process.returncode == 143, rest
    assert "Traceback" not in rest
    if list(tmp_path.iterdir()):  # the first evaluation was over
        assert results(tmp_path)["interrupted"]


def test_sigterm_is_left_alone_outside_the_main_thread(tmp_path: Path) -> None:
    before, found = signal.getsignal(signal.SIGTERM), []
    thread = threading.Thread(target=lambda: found.append(demo(tmp_path)))
    thread.start()
    thread.join()
    assert found == [0]
    assert signal.getsignal(signal.SIGTERM) is before


def test_divergence_is_told_and_keeps_the_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate, calls = train.Run.evaluate, iter(range(100))

    def diverging(run: train.Run, windows: torch.Tensor, batch: int) -> float:
        return evaluate(run, windows, batch) if next(calls) < 20 else math.nan

    monkeypatch.setattr(train.Run, "evaluate", diverging)
    assert demo(tmp_path) == 1
    assert results(tmp_path)["steps"] == [0, 2]
    assert "lower --lr" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    "argument",
    ["--model=t5", "--p=1", "--p=-0.1", "--p=nan", "--attention-p=2", "--steps=0", "--lr=0",
     "--lr=inf", "--seed=-1", "--dim=x", "--backend=cuda", "--eval-every=0"],
)  # fmt: skip
def test_a_bad_value_is_refused_by_the_parser(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(argument)
    assert stop.value.code == 2
    assert argument.split("=")[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--heads=3"], "--heads 3 does not divide --dim 16"),
        (["--context=200"], "--train-bytes 200 must be larger than --context 200"),
        (["--train-bytes=9999999"], "lower them or give a longer text"),
        (["--text=/no/such/file"], "--text /no/such/file"),
        (["--device=nonsense"], "--device nonsense cannot be used"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_training(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert demo(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_a_backend_that_cannot_serve_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tridrop.backends, "_has_triton", False)
    assert demo(tmp_path, "--backend=triton") == 2
    assert "triton is not installed" in capsys.readouterr().err


def test_missing_matplotlib_is_told_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert demo(tmp_path / "out") == 2
    assert "pip install 'tridrop[demo]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_quick_changes_defaults_and_not_what_was_given() -> None:
    asked = options.resolve(parse("--quick", "--steps=7"))
    assert asked.steps == 7
    assert asked.train_bytes == options.QUICK["train_bytes"]
    assert options.resolve(parse()).train_bytes == options.DEFAULTS["train_bytes"]


def test_attention_drops_as_the_rest_unless_it_was_given() -> None:
    assert options.resolve(parse()).attention_p == options.DEFAULTS["p"]
    assert options.resolve(parse("--p=0.3")).attention_p == 0.3
    assert options.resolve(parse("--p=0.3", "--attention-p=0")).attention_p == 0


# ------------------------------------------------------------------------------------------- text


def test_text_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "abc.txt"
    file.write_bytes(b"abc" * 200)
    assert demo(tmp_path / "out", "--text", file) == 0
    found = results(tmp_path / "out")
    assert found["text"]["name"] == "abc.txt"
    assert found["text"]["bytes"] == 600


def test_the_default_text_has_every_paragraph_of_pydoc_once() -> None:
    from pydoc_data.topics import topics

    name, loaded = text.load(None)
    assert name == "pydoc_data.topics"
    paragraphs = loaded.decode().split("\n\n")
    for topic in topics.values():
        assert set(topic.strip("\n").replace("\n\n\n", "\n\n").split("\n\n")) <= set(paragraphs)
    assert len(set(paragraphs)) == len(paragraphs)


def test_the_slices_are_disjoint_ends_of_the_text() -> None:
    first, last = text.split(bytes(range(10)), 6, 4)
    assert first.tolist() == [0, 1, 2, 3, 4, 5]
    assert last.tolist() == [6, 7, 8, 9]
    with pytest.raises(options.DemoError, match="longer text"):
        text.split(bytes(10), 6, 5)
