"""A pytest plug-in under which transformers' own tests run with every model that they make swapped.

It is for a checkout of transformers whose tests fit the installed release, and is run by hand:

    cd transformers
    export PYTHONPATH=../tridrop:../tridrop/tests
    SUITE="python -m pytest -p transformers_suite -p no:cacheprovider tests/models/bert"
    $SUITE --outcomes before.json
    $SUITE --outcomes after.json --swap
    python ../tridrop/tests/transformers_suite.py before.json after.json

The last line prints the tests that pass without the swap and not with it. `--rates 0.1` gives that
value to every dropout rate of a model's configuration, for both runs. Two tests hold for no swapped
model, since they ask for another attention function than "tridrop" in its configuration:
test_can_set_attention_dynamically and test_sdpa_can_dispatch_*; `--without attention` leaves that
switch of tridrop.swap off. `--keep-eager` leaves models alone that are made with eager attention,
so that the tests which compare others with them compare with transformers.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops  # noqa: F401  # before anything imports torchvision

RATES = ("dropout", "pdrop", "drop_rate", "drop_path")
HELD = ("passed", "skipped", "xfailed")


class Suite:
    """What is done to models while they are made, and what came of it."""

    def __init__(self, options: Any) -> None:
        self.options = options
        self.making = 0  # constructors and loaders that have not returned yet
        self.models = 0
        self.wrapped: set[type] = set()
        self.sites: collections.Counter[str] = collections.Counter()
        self.left: collections.Counter[str] = collections.Counter()
        self.outcomes: dict[str, str] = {}

    def made(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a constructor or a loader; what the outermost one has made is swapped."""
        if not self.making and self.options.rates is not None:
            for value in (*args, *kwargs.values()):
                set_rates(value, self.options.rates)
        self.making += 1
        try:
            result = make(*args, **kwargs)
        finally:
            self.making -= 1
        if self.options.swap and not self.making:
            model = args[0] if result is None else result
            self.swap(model[0] if isinstance(model, tuple) else model)
        return result

    def swap(self, model: Any) -> None:
        import tridrop

        if self.options.keep_eager and model.config._attn_implementation == "eager":
            return
        report = tridrop.swap(model, **dict.fromkeys(self.options.without, False))
        self.models += 1
        self.sites.update(site.status for site in report.sites)
        self.left.update(site.reason for site in report.sites if site.status == "left")

    def wrap(self, cls: type) -> None:
        """Reach the constructor that a class has of its own, and those of the classes below it."""
        own = cls.__dict__.get("__init__")
        if cls not in self.wrapped and own is not None:

            @functools.wraps(own)
            def init(*args: Any, **kwargs: Any) -> None:
                self.made(own, *args, **kwargs)

            cls.__init__ = init  # type: ignore[misc]
        self.wrapped.add(cls)
        for below in cls.__subclasses__():
            self.wrap(below)

    def install(self) -> None:
        """Reach the classes that exist, those still to be defined, and the loaders."""
        from transformers import PreTrainedModel

        self.wrap(PreTrainedModel)
        before = PreTrainedModel.__init_subclass__.__func__

        def init_subclass(cls: type, **kwargs: Any) -> None:
            before(cls, **kwargs)
            self.wrap(cls)

        PreTrainedModel.__init_subclass__ = classmethod(init_subclass)
        for name in ("from_pretrained", "_from_config"):
            loader = getattr(PreTrainedModel, name).__func__
            setattr(PreTrainedModel, name, classmethod(self.loading(loader)))

    def loading(self, loader: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(loader)
        def load(*args: Any, **kwargs: Any) -> Any:
            return self.made(loader, *args, **kwargs)

        return load

    def pytest_runtest_setup(self) -> None:
        """Both runs see the same numbers, also from the generator of transformers' own helpers."""
        from transformers import set_seed

        set_seed(0)
        for module in list(sys.modules.values()):
            generator = getattr(module, "global_rng", None)
            if isinstance(generator, random.Random):
                generator.seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            if self.outcomes.get(report.nodeid) != "failed":
                self.outcomes[report.nodeid] = outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.options.outcomes is not None:
            found = {"models": self.models, "sites": self.sites, "outcomes": self.outcomes}
            Path(self.options.outcomes).write_text(json.dumps(found, indent=1))
        if self.options.swap and not self.sites:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.options.swap:
            counts = ", ".join(f"{count} {status}" for status, count in self.sites.items())
            line = f"tridrop: {self.models} models swapped; sites: {counts or 'none, an error'}"
            terminalreporter.write_line(line)
            for reason, count in self.left.most_common():
                terminalreporter.write_line(f"  left {count}: {reason}")


def set_rates(config: Any, rate: float) -> None:
    """Give a configuration, and those in it, one value for all rates that are numbers."""
    from transformers import PreTrainedConfig

    if not isinstance(config, PreTrainedConfig):
        return
    for name, value in list(vars(config).items()):
        set_rates(value, rate)
        if type(value) in (int, float) and any(part in name for part in RATES):
            setattr(config, name, rate)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tridrop")
    switches = ("dropout", "attention", "inside", "across")
    group.addoption("--swap", action="store_true", help="swap every model that a test makes")
    group.addoption("--rates", type=float, help="the value of all dropout rates")
    group.addoption("--without", nargs="+", default=[], choices=switches, help="switches to be off")
    group.addoption("--keep-eager", action="store_true", help="but those with eager attention")
    group.addoption("--outcomes", metavar="FILE", help="write what became of each test")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    suite = Suite(config.option)
    suite.install()
    config.pluginmanager.register(suite, "tridrop-suite")


def compare(before: str, after: str) -> int:
    """Print what holds without the swap and not with it; the number of such tests."""
    runs = {path: json.loads(Path(path).read_text()) for path in (before, after)}
    first, second = (run["outcomes"] for run in runs.values())
    lost = [name for name in first if first[name] in HELD and second.get(name) not in HELD]
    for name in lost:
        print(f"{first[name]} -> {second.get(name, 'not run')}: {name}")
    for path, run in runs.items():
        counts = dict(collections.Counter(run["outcomes"].values()))
        print(f"{path}: {counts}, {run['models']} models swapped, sites {run['sites']}")
    return len(lost)


if __name__ == "__main__":
    sys.exit(min(compare(*sys.argv[1:]), 1))
