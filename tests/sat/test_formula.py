"""Files of formulas: what is read is what was written, and whatever else a file holds is an error with its line."""

from __future__ import annotations

import gzip
import io
import lzma
import resource

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.errors import FormulaError
from clue.sat import CNF, WCNF, read_dimacs, read_wcnf, write_dimacs, write_wcnf

LITERAL = st.integers(1, 2**31 - 1).flatmap(lambda v: st.sampled_from([v, -v]))
CLAUSES = st.lists(st.lists(LITERAL, max_size=5), max_size=8)
WEIGHTS = st.integers(0, 2**40)
CNF_FILE = b"c a comment\np cnf 4 3\n1 -2 0\nc another\n3\n-4 0 2 0\n"
OLD_FILE = b"c old\np wcnf 3 3 10\n10 1 2 0\n3 -1 0\n4 -2 3 0\n"
NEW_FILE = b"c new\nh 1 2 0\n3 -1 0\n4 -2 3 0\n"


def cnf(text: bytes) -> CNF:
    return read_dimacs(io.BytesIO(text))


def wcnf(text: bytes) -> WCNF:
    return read_wcnf(io.BytesIO(text))


def test_comments_and_line_breaks_stand_anywhere() -> None:
    assert cnf(CNF_FILE).lists() == [[1, -2], [3, -4], [2]]
    assert cnf(CNF_FILE).n_variables == 4
    assert cnf(b"p cnf 0 0").lists() == []
    assert cnf(b" \t\r\n p  cnf\t2 1 \r\n1\r\n2\r\n0").lists() == [[1, 2]]
    assert cnf(b"p cnf 2 1\n1 2 0\n%\n0\n").lists() == [[1, 2]]  # SATLIB
    assert cnf(b"p cnf 3 2\n0 1 0").lists() == [[], [1]]
    assert cnf(b"p cnf 2 1\n1 0\nc").lists() == [[1]]


@pytest.mark.parametrize("text", [OLD_FILE, NEW_FILE])
def test_both_formats_of_weighted_formulas(text: bytes) -> None:
    formula = wcnf(text)
    assert formula.n_variables == 3 and formula.header is (text is OLD_FILE)
    assert formula.hard_lists() == [[1, 2]] and formula.soft_lists() == [[-1], [-2, 3]]
    assert formula.weights.tolist() == [3, 4]


def test_without_top_every_clause_is_soft() -> None:
    formula = wcnf(b"p wcnf 2 2\n7 1 0\n9 -1 2 0\n")
    assert formula.hard_lists() == [] and formula.weights.tolist() == [7, 9]


@given(CLAUSES)
def test_dimacs_round_trip(tmp_path_factory, clauses) -> None:
    path = tmp_path_factory.getbasetemp() / "round.cnf"
    formula = CNF.from_lists(clauses, n_variables=2**31 - 1)
    write_dimacs(path, formula)
    again = read_dimacs(path)
    assert again.lists() == clauses and again.n_variables == 2**31 - 1
    assert again.clauses.dtype == np.int32


@given(CLAUSES, st.lists(st.tuples(st.lists(LITERAL, max_size=4), WEIGHTS), max_size=6), st.booleans())
def test_weighted_round_trip(tmp_path_factory, hard, soft, header) -> None:
    path = tmp_path_factory.getbasetemp() / "round.wcnf"
    formula = WCNF.from_lists(hard, [clause for clause, _ in soft], [weight for _, weight in soft])
    write_wcnf(path, formula, header=header)
    again = read_wcnf(path)
    assert (again.hard_lists(), again.soft_lists()) == (formula.hard_lists(), formula.soft_lists())
    assert again.weights.tolist() == formula.weights.tolist() and again.weights.dtype == np.int64
    assert again.n_variables == formula.n_variables and again.header is header


@pytest.mark.parametrize(("text", "error"), [
    (b"", "line 1: there is no header 'p cnf VARIABLES CLAUSES'"),
    (b"c only\nc comments\n", "line 3: there is no header"),
    (b"1 2 0\n", "line 1: expected the header 'p', got '1'"),
    (b"p wcnf 1 1\n", "line 1: expected 'p cnf', got the format 'wcnf'"),
    (b"p cnf\n1 1\n", "line 1: the header lacks the number of variables"),
    (b"p cnf 3\n", "line 1: the header lacks the number of clauses"),
    (b"p cnf 3 1 9\n", "line 1: the header has more than variables and clauses: '9'"),
    (b"p cnf -3 1\n", "line 1: the number of variables -3 is negative"),
    (b"p cnf 3 -1\n", "line 1: the number of clauses -1 is negative"),
    (b"p cnf x 1\n", "line 1: expected the number of variables, got 'x'"),
    (b"p cnf 2147483648 1\n", "line 1: the number of variables 2147483648 is too large"),
    (b"p cnf 3 99999999999999999999\n", "line 1: the number of clauses '99999999999999999999' is too large"),
    (b"p cnf 3 1\n1 4 0\n", "line 2: variable 4 is above the header's 3"),
    (b"p cnf 3 1\n1 -2147483648 0\n", "line 2: literal '-2147483648' is too large"),
    (b"p cnf 3 1\n\n1 99999999999999999999999 0\n", "line 3: literal '99999999999999999999999' is too large"),
    (b"p cnf 3 1\n1 2", "line 2: the file ends within a clause: its 0 is missing"),
    (b"p cnf 3 2\n1 2 0\n", "line 1: the header says 2 clauses, the file has 1"),
    (b"p cnf 3 1\n1 0\n2 0\n", "line 3: there are more clauses than the header's 1"),
    (b"p cnf 3 1\n1 c 0\n", "line 2: expected a literal, got 'c'"),
    (b"p cnf 3 1\n1 +2 0\n", r"line 2: expected a literal, got '\+2'"),
    (b"p cnf 3 1\n1 2.5 0\n", "line 2: expected a literal, got '2.5'"),
    (b"p cnf 3 1\n1 - 0\n", "line 2: expected a literal, got '-'"),
    (b"p cnf 3 1\n1 -0\n", "line 2: expected a literal, got '-0'"),
    (b"p cnf 3 1\n1 \xff\x00\n", r"line 2: expected a literal, got '\\xff\\x00'"),
    (b"p cnf 3 1\n" + b"1" * 50 + b"x 0\n", r"line 2: expected a literal, got '1{30}\.\.\.'"),
    (b"p cnf 3 1\n1 0\np cnf 3 1\n", "line 3: there are more clauses"),
    (b"a 1 0\n", "line 1: expected the header 'p', got 'a'"),
])
def test_malformed_dimacs(text: bytes, error: str) -> None:
    with pytest.raises(FormulaError, match=f"formula: {error}"):
        cnf(text)


@pytest.mark.parametrize(("text", "error"), [
    (b"p wcnf 3 1 0\n", "line 1: the weight of hard clauses is 0"),
    (b"p wcnf 3 1 5 5\n", "line 1: the header has more than variables, clauses and top: '5'"),
    (b"p wcnf 3 1 5\nh 1 0\n", "line 2: expected a weight, got 'h'"),
    (b"p cnf 3 1\n1 1 0\n", "line 1: expected 'p wcnf', got the format 'cnf'"),
    (b"h 1 0\nx 1 0\n", "line 2: expected a weight or 'h', got 'x'"),
    (b"-1 1 0\n", "line 1: expected a weight or 'h', got '-1'"),
    (b"1.5 1 0\n", "line 1: expected a weight or 'h', got '1.5'"),
    (b"nan 1 0\n", "line 1: expected a weight or 'h', got 'nan'"),
    (b"99999999999999999999999 1 0\n", "line 1: a weight or 'h' '99999999999999999999999' is too large"),
    (b"1152921504606846976 1 0\n1 2 0\n", r"line 2: the weights of the soft clauses add up to more than 2\^60"),
    (b"h 1", "line 1: the file ends within a clause"),
    (b"h", "line 1: the file ends within a clause"),
    (b"p wcnf 3 2 5\n5 1 0\n", "line 1: the header says 2 clauses, the file has 1"),
    (b"p wcnf 1 1 5\n5 2 0\n", "line 2: variable 2 is above the header's 1"),
])
def test_malformed_weighted_formulas(text: bytes, error: str) -> None:
    with pytest.raises(FormulaError, match=f"formula: {error}"):
        wcnf(text)


def mutated(text: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """The text with stretches cut out and bytes put in."""
    for at, length, new in edits:
        at %= len(text) + 1
        text = text[:at] + new + text[at + length:]
    return text


BYTES = st.binary(max_size=80) | st.text("0123456789- \nhpcwnf%x", max_size=80).map(str.encode)
EDITS = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 6), BYTES.map(lambda b: b[:6])), max_size=4)


@given(BYTES | EDITS.map(lambda edits: mutated(CNF_FILE, edits)))
@settings(max_examples=1000)
def test_any_bytes_are_a_formula_or_an_error(text: bytes) -> None:
    try:
        formula = cnf(text)
    except FormulaError:
        return
    lists = formula.lists()
    assert len(lists) == len(formula)
    assert all(0 < abs(literal) <= formula.n_variables for clause in lists for literal in clause)
    # A second reading, as plain as can be: the numbers after the header are the literals.
    lines = [line for line in text.split(b"\n") if not line.lstrip().startswith(b"c")]
    words = b" ".join(lines).split(b"%")[0].split()
    assert [int(word) for word in words[4:]] == formula.clauses.tolist()


@given(BYTES | EDITS.map(lambda edits: mutated(OLD_FILE, edits)) | EDITS.map(lambda edits: mutated(NEW_FILE, edits)))
@settings(max_examples=1000)
def test_any_bytes_are_a_weighted_formula_or_an_error(text: bytes) -> None:
    try:
        formula = wcnf(text)
    except FormulaError:
        return
    assert len(formula.soft_lists()) == len(formula.weights) and np.all(formula.weights >= 0)
    assert all(0 < abs(v) <= formula.n_variables for c in formula.hard_lists() + formula.soft_lists() for v in c)


@pytest.mark.parametrize("read", [read_dimacs, read_wcnf])
def test_a_header_that_lies_takes_no_memory(read) -> None:
    kind = b"cnf" if read is read_dimacs else b"wcnf"
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(FormulaError, match="the header says 9223372036854775807 clauses, the file has 0"):
        read(io.BytesIO(b"p " + kind + b" 2147483647 9223372036854775807\n"))
    assert read(io.BytesIO(b"p " + kind + b" 2147483647 0\n")).n_variables == 2147483647
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB


def test_compressed_files(tmp_path) -> None:
    for name, compress in (("a.cnf.gz", gzip.compress), ("a.cnf.xz", lzma.compress), ("plain", bytes)):
        (tmp_path / name).write_bytes(compress(CNF_FILE))
        assert read_dimacs(tmp_path / name).lists() == cnf(CNF_FILE).lists()
    for name in ("a.cnf.gz", "a.cnf.xz"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-9])
        with pytest.raises(FormulaError, match=f"{name}: the compressed file is damaged or cut short"):
            read_dimacs(str(tmp_path / name))
    with pytest.raises(FileNotFoundError):
        read_dimacs(tmp_path / "none.cnf")


def test_formulas_check_their_arrays(tmp_path) -> None:
    one = np.array([1, 0])
    assert CNF(1, one).clauses.dtype == np.int32
    for error, text, make in [
        (ValueError, "clauses: expected a 0 after every clause", lambda: CNF(3, np.array([1, 2]))),
        (ValueError, "n_variables: expected 1..2147483647, got 0", lambda: CNF(0, one)),
        (ValueError, "n_variables: expected 0..2147483647, got -1", lambda: CNF(-1, one[:0])),
        (TypeError, "clauses: expected an array of integers", lambda: CNF(1, one / 2)),
        (TypeError, "weights: expected an array of integers", lambda: WCNF.from_lists([[1]], [[-1]], [0.9])),  # type: ignore[list-item]
        (ValueError, "weights: expected one for each of 1 soft clauses, got 0", lambda: WCNF(1, one, one, one[:0])),
        (ValueError, "weights: expected numbers >= 0", lambda: WCNF(1, one, one, np.array([-1]))),
        (ValueError, r"weights: expected numbers >= 0 with a sum of at most 2\^60",
         lambda: WCNF(1, one, np.array([1, 0, 1, 0]), np.array([2**60, 1]))),
        (ValueError, "soft: expected a 0", lambda: WCNF(1, one, np.array([1]), one[:1])),
        (ValueError, r"clauses\[1\]: expected literals, got 0", lambda: CNF.from_lists([[1], [0]])),
        (ValueError, "n_variables: expected 2", lambda: CNF.from_lists([[2]], n_variables=1)),
    ]:
        with pytest.raises(error, match=text):
            make()
    path = tmp_path / "missing" / "a.cnf"
    with pytest.raises(FileNotFoundError):
        write_dimacs(path, CNF(1, one))
