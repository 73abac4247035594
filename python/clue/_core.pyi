"""Types of the native core: arguments are checked natively, with errors that name the argument."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

# Logic (csrc/logic)

_Edges = tuple[npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.uint8]]

def cadical_version() -> str: ...
def assign(
    n_nodes: int,
    editable: npt.NDArray[np.uint8],
    forget: list[_Edges],
    retain: list[_Edges],
    weights: npt.NDArray[np.int64],
    risk: npt.NDArray[np.int64],
    reach: npt.NDArray[np.int64],
    semantics: str,
    time_limit: float,
    on_bounds: Callable[[int, int], object] | None = None,
    digest: bytes | None = None,
    retain_pin: npt.NDArray[np.int8] | None = None,
    forget_pin: npt.NDArray[np.int8] | None = None,
    survey: bool = False,
) -> dict[str, Any]:
    """``interrupted`` is None, or the exception that a signal or ``on_bounds`` raised."""

def checksum(values: npt.NDArray[Any]) -> bytes:
    """32 bytes that tell arrays apart, by their content; see csrc/logic/checksum.hpp.

    Raises:
        ValueError: ``values`` is not one contiguous dimension.
    """

def check_circuits(
    n_nodes: int,
    editable: npt.NDArray[np.uint8],
    forget: list[_Edges],
    retain: list[_Edges],
    weights: npt.NDArray[np.int64],
    semantics: str,
    digest: bytes,
    certificate: bytes,
) -> dict[str, Any]: ...
def operate(
    n_nodes: int,
    editable: npt.NDArray[np.uint8],
    forget: list[_Edges],
    retain: list[_Edges],
    weights: npt.NDArray[np.int64],
    risk: npt.NDArray[np.int64],
    reach: npt.NDArray[np.int64],
    pin: npt.NDArray[np.int8] | None,
    limits: npt.NDArray[np.int32],
    least: bool,
    time_limit: float,
) -> dict[str, Any]:
    """``interrupted`` is None, or the exception that a signal raised."""

# SAT (csrc/sat). Wrapped by clue.sat, where each call is described; clauses in arrays end with 0, and seconds of 0 and
# limits of -1 mean none.

class SatSolver:
    def __init__(self) -> None: ...
    def set_option(self, name: str, value: int) -> None: ...
    def option(self, name: str) -> int: ...
    def write_proof(self, path: bytes, format: str, binary: bool) -> None: ...
    def close_proof(self) -> None: ...
    def discard_proof(self) -> None: ...
    def variables(self) -> int: ...
    def reserve(self, variables: int) -> None: ...
    def add_array(self, clauses: npt.NDArray[np.int32]) -> None: ...
    def add_clauses(self, clauses: Iterable[Iterable[int]]) -> None: ...
    def add_clause(self, clause: Iterable[int]) -> None: ...
    def constrain(self, clause: Iterable[int]) -> None: ...
    def solve(self, assumptions: Iterable[int], seconds: float, conflicts: int, decisions: int) -> bool | None: ...
    def simplify(self, rounds: int, seconds: float) -> bool | None: ...
    def terminate(self) -> bool: ...
    def propagate(self, assumptions: Iterable[int]) -> npt.NDArray[np.int32] | None: ...
    def model(self) -> npt.NDArray[np.int8]: ...
    def value(self, literal: int) -> bool: ...
    def core(self) -> npt.NDArray[np.int32]: ...
    def constraint_failed(self) -> bool: ...
    def phase(self, literal: int, forced: bool) -> None: ...
    def freeze(self, literal: int, frozen: bool) -> None: ...
    def fixed(self, literal: int) -> bool | None: ...
    def statistics(self) -> dict[str, int]: ...

def sat_options() -> list[tuple[str, int, int, int, str]]:
    """(name, default, low, high, use) of every option of CaDiCaL."""

def flatten(clauses: Iterable[Iterable[int]]) -> npt.NDArray[np.int32]: ...
def read_cnf(text: bytes) -> tuple[int, npt.NDArray[np.int32]]:
    """Variables and clauses of a DIMACS file; ValueError with the line."""

def read_wcnf(
    text: bytes,
) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int32], npt.NDArray[np.int64], bool]:
    """Variables, hard and soft clauses, weights, and whether there was a header; ValueError with the line."""

def write_cnf(n_variables: int, clauses: npt.NDArray[np.int32]) -> bytes: ...
def write_wcnf(
    n_variables: int,
    hard: npt.NDArray[np.int32],
    soft: npt.NDArray[np.int32],
    weights: npt.NDArray[np.int64],
    header: bool,
) -> bytes: ...
def largest_variable(clauses: npt.NDArray[np.int32], name: str) -> int: ...
def check_soft(soft: npt.NDArray[np.int32], weights: npt.NDArray[np.int64]) -> int: ...
def minimize(
    n_variables: int,
    hard: npt.NDArray[np.int32],
    soft: npt.NDArray[np.int32],
    weights: npt.NDArray[np.int64],
    seconds: float,
    on_bounds: Callable[[int, int], object] | None,
    digest: bytes | None,
) -> dict[str, Any]:
    """``interrupted`` is None, or the exception that a signal or ``on_bounds`` raised."""

def check_formula(
    n_variables: int,
    hard: npt.NDArray[np.int32],
    soft: npt.NDArray[np.int32],
    weights: npt.NDArray[np.int64],
    digest: bytes,
    certificate: bytes,
) -> dict[str, Any]: ...

# Kernels (csrc/attribution, csrc/update). Tensors come through DLPack: torch, NumPy and others.

def neuron_attribution(
    clean: Any,
    corrupted: Any,
    grad_clean: Any,
    grad_corrupted: Any | None,
    out_ns: Any,
    out_dn: Any | None = None,
    out_sq_ns: Any | None = None,
    out_sq_dn: Any | None = None,
    mask: Any | None = None,
    out_count: Any | None = None,
) -> None:
    """Add every neuron's noising and denoising terms, and their squares, over tokens to sums, in place, in one pass.

    ``out_ns += sum_t (corrupted - clean) * grad_clean``, ``out_dn += sum_t (corrupted - clean) * grad_corrupted``, and
    ``out_sq_*`` the sums of the squared terms. The same bits for any number of threads and any instruction set. Ns alone
    takes ``grad_corrupted`` None and no other sum.

    Args:
        clean, corrupted, grad_clean, grad_corrupted: [tokens, neurons] bf16, fp16, fp32 or fp64, all alike, neurons
            next to each other in memory.
        out_ns, out_dn, out_sq_ns, out_sq_dn: contiguous [neurons] fp32, or fp64 for fp64 inputs. ``out_dn`` goes with
            ``grad_corrupted``, ``out_sq_dn`` with both ``out_dn`` and ``out_sq_ns``; ``out_sq_ns`` may be left out.
        mask: [tokens] uint8 or bool; tokens with zero are left out and not read.
        out_count: int64 [1]; the number of tokens that entered is added. It is no return value because on CUDA that
            would wait for the device.

    Raises:
        TypeError, ValueError, BufferError: ``<argument>: <expected>, got <actual>``.
    """

def norm_backward(grad: Any, normal: Any, scale: Any, gain: Any, centre: bool) -> None:
    """Pull gradients at a norm's output back to its input, in place.

    With ``y = grad * gain``: ``grad = scale * (y - normal * <y, normal> / width - mean(y))``, a row at a time. The same
    bits for any number of threads and any instruction set.

    Args:
        grad: [readers * tokens, width] fp32 or fp64; row i is of token i % tokens. All arguments are contiguous.
        normal: [tokens, width], the norm's output before gain and bias; ``None`` holds its scale constant.
        scale: [tokens], 1 / rms or 1 / deviation.
        gain: [width], or ``None`` for a norm without weights.
        centre: whether the norm subtracts the mean (layer norm).

    Raises:
        TypeError, ValueError, BufferError: ``<argument>: <expected>, got <actual>``.
    """

def masked_adamw(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    index: Any,
    axis: int,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: float,
    master: Any = None,
    rounding_key: int | None = None,
) -> None:
    """One AdamW step (arXiv 1711.05101, as ``torch.optim.AdamW``) on some rows or columns of a parameter, in place.

    Nothing else of ``param`` is read or written, weight decay included. The same bits for any number of threads and any
    instruction set.

    Args:
        param: [R, C] or [R] bf16, fp16, fp32 or fp64, any strides.
        grad: like ``param``, or the slices alone: [n, C] for rows, [R, n] for columns. Its dtype is that of ``param``;
            float32 goes with bf16 and fp16 too.
        exp_avg, exp_avg_sq: contiguous [n, C] for rows, [n, R] (transposed) for columns, [n] for one dimension; fp32,
            or fp64 for an fp64 parameter.
        index: int64 [n], the rows or columns, sorted and unique.
        axis: 0 for rows, 1 for columns.
        step: number of this step, from 1.
        grad_scale: factor on the gradient.
        master: the slices' values in fp32, in the layout of ``exp_avg``, for a bf16 or fp16 parameter, which then only
            receives them rounded. Without it the parameter's own rounded values are the starting point of every step.
        rounding_key: from 0 to 2**64 - 1; a bf16 parameter without a master is then rounded up or down at random, right on
            average (arXiv 1502.02551). The random numbers are a function of the key, an element's row and its column: give
            every parameter and every step a key of its own.

    Raises:
        TypeError, ValueError, BufferError: ``<argument>: <expected>, got <actual>``.
    """

def openmp_threads() -> int:
    """Threads the kernels use when called from this thread; 1 without an OpenMP runtime and in forked children."""

def isas() -> list[str]:
    """Instruction sets the kernels were built for and this processor has, slowest first."""

def set_isa(name: str) -> None:
    """Use the kernels of this instruction set from now on (the best one is in use from the start)."""

def kernels() -> dict[str, str]:
    """The instruction set in use, by kernel."""
