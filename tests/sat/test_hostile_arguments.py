"""Files and calls that mean harm: an answer, or an error of the documented kinds; for the sanitizers too."""

from __future__ import annotations

import gzip
import io
import lzma
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue import _core
from clue.errors import FormulaError
from clue.sat import read_dimacs, read_wcnf

INT32 = 2**31 - 1
REFUSALS = (TypeError, ValueError, RuntimeError, MemoryError, OverflowError)

# --- files ----------------------------------------------------------------------------------------------------------

TOKENS = st.sampled_from([
    b"p", b"cnf", b"wcnf", b"h", b"c", b"%", b"0", b"1", b"-1", b"2", b"-3", b"--1", b"-", b"+1",
    b"1000000000000000000", b"9223372036854775807", b"9223372036854775808", b"18446744073709551615", b"2147483647",
    b"2147483648", b"-2147483648", b"-2147483649", b"4294967297", b"1" * 400, b"-" + b"9" * 30, b"1e5", b"0x10", b"\x00",
    b"\xff\xfe", b"\x1f\x8b\x08", b"\xfd7zXZ\x00", b"1\x000"])
BLANKS = st.sampled_from([b" ", b"\n", b"\t", b"\r\n", b"", b"\x0b", b"  \n\n"])
FILES = st.lists(st.tuples(TOKENS, BLANKS), max_size=14).map(lambda parts: b"".join(a + b for a, b in parts))


@given(head=st.sampled_from([b"", b"p cnf 3 2\n", b"p cnf 2147483647 1000000000000000000\n", b"p wcnf 3 2 9\n",
                             b"p wcnf 2147483647 1000000000000000000 18446744073709551615\n", b"h "]), rest=FILES)
@settings(max_examples=500)
def test_hostile_text(head: bytes, rest: bytes) -> None:
    for reader in (_core.read_cnf, _core.read_wcnf):
        try:
            reader(head + rest)
        except ValueError as error:
            assert str(error).startswith("line ")


@pytest.mark.parametrize(("read", "text"), [(read_dimacs, b"p cnf 3 2\n1 -2 0\n-3 0\n"),
                                            (read_wcnf, b"p wcnf 3 2 9\n9 1 -2 0\n4 -3 0\n"),
                                            (read_wcnf, b"h 1 -2 0\n4 -3 0\nc\n")])
def test_every_truncation(read: Any, text: bytes) -> None:
    """What is cut off is missed, unless the rest is whole, which without header it can be after any clause."""
    for form in (bytes, gzip.compress, lzma.compress):
        whole = form(text)
        for length in range(len(whole)):
            try:
                read(io.BytesIO(whole[:length]))
            except FormulaError:
                continue
            rest = text[:length].split()
            assert length == 0 or (form is bytes and rest[-1] in (b"0", b"c"))
            assert length == 0 or b"p" not in rest or rest == text.split()
        if form is not bytes:  # compressed bytes where text is expected
            for native in (_core.read_cnf, _core.read_wcnf):
                with pytest.raises(ValueError, match="line 1: expected"):
                    native(whole)


# --- arrays ---------------------------------------------------------------------------------------------------------

LITERALS = st.integers(-4, 4) | st.sampled_from([INT32, -INT32, -INT32 - 1, 1 << 30])
FLAT = st.lists(LITERALS, max_size=12).map(lambda values: np.array(values, np.int32))
SMALL = st.lists(st.integers(-4, 4), max_size=12).map(lambda values: np.array([*values, 0], np.int32))
ODD = st.sampled_from([None, 1, "12", [1, 2**40, 0], [[1], [0]], np.zeros((2, 2), np.int32), np.ones(3),
                       np.array(["1"]), np.array([2**40, 0]), np.zeros(4, np.int32)[::2], np.array([1, 0], ">i4"),
                       np.array(0, np.int32),
                       np.array([True, False]), np.array([None, 1], object)])
CLAUSES = SMALL | FLAT | ODD
WEIGHTS = st.lists(st.integers(-1, 5) | st.sampled_from([1 << 60, 2**63 - 1, -(2**63)]), max_size=5).map(
    lambda values: np.array(values, np.int64))
COUNTS = st.integers(-2, 6) | st.sampled_from([INT32, -INT32 - 1, INT32 + 1, 10**18, -(10**18)])


@given(n=COUNTS, hard=CLAUSES, soft=CLAUSES, weights=WEIGHTS | ODD)
@settings(max_examples=500)
def test_minimize(n: int, hard: Any, soft: Any, weights: Any) -> None:
    for call in (lambda: _core.minimize(n, hard, soft, weights, 1.0, None), lambda: _core.check_soft(soft, weights),
                 lambda: _core.write_wcnf(n, hard, soft, weights, True), lambda: _core.write_cnf(n, hard),
                 lambda: _core.largest_variable(hard, "hard"), lambda: _core.flatten(hard)):
        with suppress(*REFUSALS):
            call()


LISTS = st.lists(LITERALS, max_size=5) | ODD
CALLS = st.one_of(
    st.tuples(st.just("add_array"), CLAUSES), st.tuples(st.sampled_from(["add_clause", "constrain"]), LISTS),
    st.tuples(st.just("add_clauses"), st.lists(LISTS, max_size=3) | ODD), st.tuples(st.just("propagate"), LISTS),
    st.tuples(st.just("solve"), LISTS, st.just(1.0), COUNTS, COUNTS),
    st.tuples(st.just("simplify"), COUNTS, st.just(1.0)),
    st.tuples(st.just("reserve"), COUNTS), st.tuples(st.just("phase"), LITERALS, st.booleans()),
    st.tuples(st.just("freeze"), LITERALS, st.booleans()), st.tuples(st.just("fixed"), LITERALS | COUNTS),
    st.tuples(st.just("value"), LITERALS | COUNTS),
    st.tuples(st.just("set_option"), st.sampled_from(["factor", "lucky", "verbose", "", "x" * 500]), COUNTS),
    st.tuples(st.sampled_from(["model", "core", "constraint_failed", "statistics", "variables", "terminate",
                               "close_proof"])))


@given(st.lists(CALLS, max_size=12))
@settings(max_examples=300)
def test_any_calls_in_any_order(calls: list[tuple[Any, ...]]) -> None:
    solver = _core.SatSolver()
    for name, *arguments in calls:
        with suppress(*REFUSALS):
            getattr(solver, name)(*arguments)
    # After all that it still solves.
    try:
        solver.add_array(np.array([3, 0, -3, 0], np.int32))
    except ValueError as error:  # the variable may be one that the solver made
        assert "belongs to the solver" in str(error)
    else:
        assert solver.solve([], 0.0, -1, -1) is False
