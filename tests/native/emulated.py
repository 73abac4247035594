"""The CUDA kernels on a machine without a GPU: csrc/*.cu built by the C++ compiler over tests/native/emulation.

Their tensors are the CPU's, handed over under the name of a CUDA device. ``CLUE_EMULATION_FLAGS`` adds options for the
compiler, such as a sanitizer's.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import Any

import pybind11
import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
EMULATION = Path(__file__).parent / "emulation"
SOURCES = [*(ROOT / "csrc" / name for name in ("bindings/cuda.cpp", "attribution/neuron.cu", "attribution/norm.cu",
                                               "update/masked_adamw.cu")), EMULATION / "emulation.cpp"]
CUDA = 2  # as DLPack numbers kinds of devices

pointer_of = ctypes.pythonapi.PyCapsule_GetPointer
pointer_of.restype, pointer_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]


class OnDevice:
    """A tensor that says it lies on CUDA device 0."""

    def __init__(self, tensor: Tensor) -> None:
        self.requires_grad = tensor.requires_grad
        self.is_neg = tensor.is_neg
        self._tensor = tensor

    def __dlpack_device__(self) -> tuple[int, int]:
        return CUDA, 0

    def __dlpack__(self, *, stream: int, max_version: tuple[int, int]) -> Any:
        capsule = self._tensor.__dlpack__(max_version=max_version)
        managed = pointer_of(capsule, b"dltensor_versioned")
        # Behind the version, the context, the deleter, the flags and the pointer to the data, each of eight bytes.
        assert managed is not None
        ctypes.c_int32.from_address(managed + 40).value = CUDA
        return capsule


class Emulated:
    """``clue._cuda`` for tensors of the CPU."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Callable[..., Any]:
        kernel = getattr(self._module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            seen: dict[int, OnDevice] = {}

            def moved(value: Any) -> Any:
                return seen.setdefault(id(value), OnDevice(value)) if isinstance(value, Tensor) else value

            return kernel(*map(moved, arguments), **{name: moved(value) for name, value in named.items()})

        return call


def load(changed: Mapping[str, Path] = {}) -> Emulated:
    """Builds the module where its sources are new; skips the test where there is no compiler.

    ``changed`` puts other files in the place of sources, by their names.
    """
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    sources = [changed.get(source.name, source) for source in SOURCES]
    command = [compiler, "-std=c++20", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off",
               *os.environ.get("CLUE_EMULATION_FLAGS", "").split(), f"-I{EMULATION}", f"-I{ROOT / 'csrc'}",
               f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}", "-x", "c++"]
    state = hashlib.sha256(repr([command, torch.__version__, sys.version]).encode())
    for file in sorted([*EMULATION.iterdir(), *(path for path in (ROOT / "csrc").rglob("*") if path.is_file())]):
        state.update(file.read_bytes())
    for file in changed.values():
        state.update(file.read_bytes())
    name = f"emulation_{state.hexdigest()[:16]}"
    built = ROOT / "build" / name / f"_cuda{EXTENSION_SUFFIXES[0]}"
    if not built.exists():
        built.parent.mkdir(parents=True, exist_ok=True)
        fresh = built.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, *map(str, sources), "-o", str(fresh)], check=True)
        fresh.rename(built)
    spec = importlib.util.spec_from_file_location(f"{name}._cuda", built)  # pybind11 keeps modules by their names
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Emulated(module)
