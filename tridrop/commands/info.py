"""``tridrop info``: versions, devices and backends, to paste into a bug report."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from contextlib import suppress
from typing import Any

import torch

from .. import __version__, backends
from ..backends.cpu import serving
from ..spec.attention import SPECIALIZE


class Info(dict[str, Any]):
    """The result of :func:`collect`, which prints as text, also in a notebook."""

    def __str__(self) -> str:
        return render(self)

    def _repr_html_(self) -> str:
        from rich.text import Text

        from ..base import terminal

        return terminal.html(Text(str(self)))


def collect() -> Info:
    """Versions, devices, backends, and why each backend is or is not available.

    >>> from tridrop.commands import info
    >>> found = info.collect()
    >>> found["tridrop"], "backend reference: available" in str(found)
    ('0.1.0', True)
    """
    devices = [f"cpu: {os.cpu_count()} logical cores, {torch.get_num_threads()} torch threads"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        devices.append(
            f"cuda:{i}: {properties.name}, compute capability "
            f"{properties.major}.{properties.minor}, {properties.total_memory / 2**30:.0f} GiB"
        )
    return Info(
        {
            "tridrop": __version__,
            "torch": torch.__version__,
            "cuda of torch": torch.version.cuda or getattr(torch.version, "hip", None) or "none",
            **versions("triton"),
            "python": platform.python_version(),
            "platform": platform.platform(),
            "devices": devices,
            "backends": backends.report(),
            "default on cpu": _choice("cpu"),
            "default on cuda": _choice("cuda"),
            "environment": {
                name: os.environ[name]
                for name in (
                    backends.ENVIRONMENT,
                    backends.CPU_ENVIRONMENT,
                    serving.CACHE_ENVIRONMENT,
                    SPECIALIZE,
                    "TRITON_INTERPRET",
                    "CUDA_VISIBLE_DEVICES",
                )
                if name in os.environ
            },
        }
    )


def _choice(device: str) -> str:
    try:
        return backends.name_for(torch.device(device))
    except (ImportError, ValueError) as error:  # the environment names a backend that cannot run
        return f"none: {error}"


def versions(*packages: str) -> dict[str, str]:
    """The versions of packages, of which some may not be installed."""
    found = dict.fromkeys(packages, "not installed")
    for package in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def render(found: dict[str, Any]) -> str:
    """The result as lines of text."""
    lines = []
    for name, value in found.items():
        if name == "backends":
            for row in value:
                state = "available" if row["available"] else "not available"
                lines.append(f"backend {row['name']}: {state} ({row['why']})")
        elif isinstance(value, list):
            lines.extend(f"device {item}" for item in value)
        elif isinstance(value, dict):
            lines.extend(f"{key}={item}" for key, item in value.items())
        else:
            lines.append(f"{name}: {value}")
    return "\n".join(lines)


def main(as_json: bool) -> int:
    """Print versions, devices and backends."""
    found = collect()
    print(json.dumps(found, indent=1) if as_json else render(found))
    return 0
