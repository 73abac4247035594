"""What CLUE runs on: versions, hardware, native kernels and optional parts. Behind ``clue doctor`` and ``run.json``.

:func:`versions` and :func:`hardware` read package metadata only and do not import torch, so every run can record them;
:func:`diagnose` also loads torch and the native extensions to say what they can do.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path
from typing import Any

from . import __version__

_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")
_EXTRAS = {"parquet": "pyarrow", "datasets": "datasets", "gguf": "gguf", "lm-eval": "lm_eval"}


def versions() -> dict[str, str | None]:
    """Version of CLUE, of Python and of the packages that decide results; None where a package is not installed."""
    found: dict[str, str | None] = {"clue": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def hardware() -> dict[str, Any]:
    """Operating system, processor and its cores; the GPU too when torch has been imported already."""
    found: dict[str, Any] = {
        "system": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return found


def cache_folder() -> Path:
    """Where trained demo models are kept: $CLUE_CACHE, else ~/.cache/clue."""
    return Path(os.environ.get("CLUE_CACHE") or Path.home() / ".cache" / "clue")


def diagnose() -> dict[str, Any]:
    """Everything ``clue doctor`` prints, as plain JSON values.

    A part that cannot be loaded is reported under ``problems``, one sentence each with its remedy; nothing is raised.
    """
    problems: list[str] = []
    report: dict[str, Any] = {"versions": versions()}
    torch = _load("torch", "install it with `pip install torch`", problems)
    report["hardware"] = hardware()
    if torch is not None:
        report["torch"] = {"threads": torch.get_num_threads(), "cuda": torch.version.cuda,
                           "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0}
    core = _load("clue._core", "build it with `make setup` or `pip install .`", problems)
    if core is not None:
        report["versions"]["cadical"] = core.cadical_version()
        report["kernels"] = dict(core.kernels())
        report["isas"] = list(core.isas())
        report["openmp_threads"] = core.openmp_threads()
    if util.find_spec("clue._cuda") is None:
        report["cuda_kernels"] = None
    else:
        cuda = _load("clue._cuda", "rebuild it for this CUDA version, or with CLUE_CUDA=OFF", problems)
        report["cuda_kernels"] = None if cuda is None else {"devices": cuda.device_count()}
    report["extras"] = {extra: util.find_spec(module) is not None for extra, module in _EXTRAS.items()}
    report["cache"] = str(cache_folder())
    report["problems"] = problems
    return report


def describe(report: Mapping[str, Any]) -> str:
    """The text of a :func:`diagnose` report, one line per fact."""
    lines = [f"{name:<16}{version or 'not installed'}" for name, version in report["versions"].items()]
    hardware = report["hardware"]
    lines.append(f"{'system':<16}{hardware['system']}, {hardware['machine']}")
    lines.append(f"{'processor':<16}{hardware['processor']}, {hardware['cores']} cores")
    lines += [f"{'gpu':<16}{name}" for name in hardware.get("gpus", [])] or [f"{'gpu':<16}none visible to torch"]
    if "torch" in report:
        lines.append(f"{'torch threads':<16}{report['torch']['threads']}")
    for kernel, isa in report.get("kernels", {}).items():
        lines.append(f"{'kernel':<16}{kernel}: {isa} in use, of {', '.join(report['isas'])}")
    if "openmp_threads" in report:
        lines.append(f"{'OpenMP threads':<16}{report['openmp_threads']}")
    cuda = report["cuda_kernels"]
    lines.append(f"{'CUDA kernels':<16}" + ("not built" if cuda is None else f"built, {cuda['devices']} device(s)"))
    for extra, present in report["extras"].items():
        lines.append(f"{'extra':<16}{extra}: " + ("installed" if present else f"pip install 'clue-unlearn[{extra}]'"))
    lines.append(f"{'cache':<16}{report['cache']}")
    lines += [f"{'problem':<16}{problem}" for problem in report["problems"]]
    return "\n".join(lines)


def _load(module: str, remedy: str, problems: list[str]) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        problems.append(f"{module} cannot be imported ({error}): {remedy}")
        return None


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
