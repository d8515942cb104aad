"""A pytest plug-in under which transformers' own tests run with every model that they make swapped.

It is for a checkout of transformers that fits the installed release, and is run by hand:

    cd transformers
    export PYTHONPATH=../tridrop:../tridrop/tests
    SUITE="python -m pytest -p transformers_suite -p no:cacheprovider tests/models/bert"
    $SUITE --outcomes before.json
    $SUITE --outcomes after.json --swap
    python ../tridrop/tests/transformers_suite.py before.json after.json

The last line prints which tests pass without the swap and not with it. `--rates 0.1` gives that
value to every dropout rate of a model's configuration, for both runs.
"""

from __future__ import annotations

import collections
import functools
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision_ops  # noqa: F401  # before anything imports torchvision

RATES = ("dropout", "pdrop", "drop_rate", "drop_path", "dropout_rate")
PASSED = ("passed", "skipped", "xfailed")


class Suite:
    """What is done to models while they are made, and what came of it."""

    def __init__(self, swap: bool, rate: float | None, path: str | None) -> None:
        self.swap, self.rate, self.path = swap, rate, path
        self.making = 0  # constructors and loaders that have not returned yet
        self.models = 0
        self.sites: collections.Counter[str] = collections.Counter()
        self.left: collections.Counter[str] = collections.Counter()
        self.outcomes: dict[str, str] = {}

    def made(self, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a constructor or a loader; what the outermost one has made is swapped."""
        self.making += 1
        try:
            result = make(*args, **kwargs)
        finally:
            self.making -= 1
        if self.swap and not self.making:
            model = args[0] if result is None else result
            self.swapped(model[0] if isinstance(model, tuple) else model)
        return result

    def swapped(self, model: Any) -> None:
        import tridrop

        report = tridrop.swap(model)
        self.models += 1
        self.sites.update(site.status for site in report.sites)
        self.left.update(site.reason for site in report.sites if site.status == "left")

    def wrap(self, cls: type) -> None:
        """Make the constructor that a class has of its own report to this plug-in."""
        own = cls.__dict__.get("__init__")
        if own is None:
            return

        @functools.wraps(own)
        def init(model: Any, config: Any, *args: Any, **kwargs: Any) -> None:
            if self.rate is not None and not self.making:
                set_rates(config, self.rate)
            self.made(own, model, config, *args, **kwargs)

        cls.__init__ = init  # type: ignore[misc]

    def install(self) -> None:
        """Reach the classes that exist, those still to be imported, and the loaders."""
        from transformers import PreTrainedModel

        for cls in subclasses(PreTrainedModel):
            self.wrap(cls)
        before = PreTrainedModel.__init_subclass__.__func__

        def init_subclass(cls: type, **kwargs: Any) -> None:
            before(cls, **kwargs)
            self.wrap(cls)

        PreTrainedModel.__init_subclass__ = classmethod(init_subclass)
        for name in ("from_pretrained", "_from_config"):
            loader = getattr(PreTrainedModel, name).__func__
            setattr(PreTrainedModel, name, classmethod(functools.partial(self.made, loader)))

    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Both runs see the same numbers."""
        from transformers import set_seed

        set_seed(0)
        for name in ("global_rng",):
            for module in list(sys.modules.values()):
                generator = getattr(module, name, None)
                if isinstance(generator, random.Random):
                    generator.seed(0)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            outcome = "xfailed" if hasattr(report, "wasxfail") else report.outcome
            self.outcomes[report.nodeid] = outcome

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.path is not None:
            found = {"models": self.models, "sites": self.sites, "outcomes": self.outcomes}
            Path(self.path).write_text(json.dumps(found, indent=1))
        if self.swap and not self.sites:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.swap:
            counts = ", ".join(f"{count} {status}" for status, count in self.sites.items())
            line = f"tridrop: {self.models} models swapped; sites: {counts or 'none, an error'}"
            terminalreporter.write_line(line)
            for reason, count in self.left.most_common():
                terminalreporter.write_line(f"  left {count}: {reason}")


def subclasses(cls: type) -> Iterator[type]:
    """A class and everything below it."""
    yield cls
    for below in cls.__subclasses__():
        yield from subclasses(below)


def set_rates(config: Any, rate: float) -> None:
    """Give a configuration, and those in it, one value for all rates that are numbers."""
    from transformers import PretrainedConfig

    for name, value in list(vars(config).items()):
        if isinstance(value, PretrainedConfig):
            set_rates(value, rate)
        elif type(value) in (int, float) and any(part in name for part in RATES):
            setattr(config, name, rate)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("tridrop")
    group.addoption("--swap", action="store_true", help="swap every model that a test makes")
    group.addoption("--rates", type=float, help="the value of all dropout rates")
    group.addoption("--outcomes", metavar="FILE", help="write what became of each test")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(1)
    options = config.option
    suite = Suite(options.swap, options.rates, options.outcomes)
    suite.install()
    config.pluginmanager.register(suite, "tridrop-suite")


def compare(before: str, after: str) -> int:
    """Print what holds without the swap and not with it; the number of such tests."""
    runs = [json.loads(Path(path).read_text()) for path in (before, after)]
    first, second = (run["outcomes"] for run in runs)
    lost = [name for name in first if first[name] in PASSED and second.get(name) not in PASSED]
    for name in lost:
        print(f"{first[name]} -> {second.get(name, 'not run')}: {name}")
    for path, run in zip((before, after), runs, strict=True):
        print(path, dict(collections.Counter(run["outcomes"].values())), run["models"], run["sites"])
    return len(lost)


if __name__ == "__main__":
    sys.exit(min(compare(*sys.argv[1:]), 1))
