"""Certificates of weighted formulas: both checkers agree, and neither accepts what is false."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clue.errors import CertificateError, RefutedError
from clue.sat import WCNF, check_certificate, minimize
from clue.sat.maxsat import _digest

from ..logic.test_certificate import changed, numbers
from ..oracles import certificate as oracle
from .test_minimize import hitting_sets, random_wcnf
from .test_solver import pigeons


class Case:
    """A formula, and the certificate of its least cost (None: it has no model)."""

    def __init__(self, folder: Path, n: int, hard: list[list[int]], soft: list[list[int]], weights: list[int]) -> None:
        self.parts = n, hard, soft, weights
        self.formula = WCNF.from_lists(hard, soft, weights, n_variables=n)
        found = minimize(self.formula, certify=folder / "c")
        self.cost = found.cost
        self.certificate = (folder / "c").read_bytes()

    def check_slowly(self, certificate: bytes) -> int | None:
        return oracle.check_formula(certificate, _digest(self.formula), *self.parts)

    def proves_nothing_false(self, certificate: bytes, slowly: bool = True) -> bool:
        """Whether it is accepted; then its claim must hold, and the plain checker must accept it too."""
        try:
            accepted = check_certificate(self.formula, certificate)
        except CertificateError:
            accepted = None
        if accepted is not None:
            assert accepted.cost == self.cost and accepted.satisfiable == (self.cost is not None)
        if slowly:
            try:
                assert self.check_slowly(certificate) == self.cost
            except oracle.Wrong:
                assert accepted is None, "the plain checker refuses what the fast one accepts"
        return accepted is not None


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(b, marks=pytest.mark.slow) for b in range(2, 10))])
def test_both_checkers_verify(tmp_path: Path, block: int) -> None:
    rng = np.random.default_rng(block)
    unsatisfiable = cores = 0
    for _ in range(60):
        case = Case(tmp_path, *random_wcnf(rng))
        found = check_certificate(case.formula, case.certificate)
        assert found.cost == case.check_slowly(case.certificate) == case.cost
        assert found.satisfiable == (case.cost is not None)
        unsatisfiable += not found.satisfiable
        cores += found.cores
    assert unsatisfiable > 0 and cores > 0


def random_soft(seed: int, largest: int) -> tuple[int, list[list[int]], list[list[int]], list[int]]:
    """Twelve variables, clauses of three: many cores, totalizers over totalizers, soft clauses of several literals."""
    rng = np.random.default_rng(seed)

    def clauses(count: int, size: int) -> list[list[int]]:
        return [(rng.choice(np.arange(1, 13), size, replace=False) * rng.choice([-1, 1], size)).tolist()
                for _ in range(count)]

    soft = clauses(40, 3) + clauses(12, 2) + clauses(10, 1)
    return 12, clauses(8, 3), soft, rng.integers(1, largest + 1, len(soft)).tolist()


@pytest.mark.parametrize("largest", [1, 20])
def test_random_soft_clauses_verify(tmp_path: Path, largest: int) -> None:
    for seed in range(3):
        case = Case(tmp_path, *random_soft(seed, largest))
        found = check_certificate(case.formula, case.certificate)
        assert found.cost == case.check_slowly(case.certificate) == case.cost
        assert found.cores > 1


def test_no_model_is_proven_too(tmp_path: Path) -> None:
    case = Case(tmp_path, 20, pigeons(4), [[1], [-1, 2]], [3, 4])
    found = check_certificate(case.formula, case.certificate)
    assert not found.satisfiable and found.cost is None and case.cost is None
    assert case.check_slowly(case.certificate) is None
    # An empty hard clause, one that units falsify, and no proof at all.
    for hard in ([[1], []], [[1], [2], [-1, -2]]):
        one = Case(tmp_path, 3, hard, [[3]], [1])
        assert one.check_slowly(one.certificate) is None
        assert not check_certificate(one.formula, one.certificate).satisfiable
    with pytest.raises(RefutedError, match="proves nothing"):
        check_certificate(case.formula, case.certificate[:46] + numbers(0))
    with pytest.raises(RefutedError, match="the empty clause is not derived"):
        check_certificate(case.formula, case.certificate[:46] + numbers(1, 0, 0, 0))
    # Hard literals hold for models that cost little, not for all.
    with pytest.raises(RefutedError, match="costs too little to be hard"):
        check_certificate(case.formula, case.certificate[:46] + numbers(1, 0, 1, 0, 5, 2, 0))


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    folder = tmp_path_factory.mktemp("cases")
    return [Case(folder, *random_soft(4, 5)), Case(folder, 20, pigeons(3), [[1]], [1]),
            Case(folder, 3, [[1, 2], [-1, 3]], [[-1], [-2], [-3], [1, -3], []], [3, 2, 2, 1, 7])]


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 6))])
def test_changed_certificates_prove_nothing_false(cases: list[Case], block: int) -> None:
    rng = np.random.default_rng([block, 5])
    for case in cases:
        for i in range(600):
            case.proves_nothing_false(changed(case.certificate, rng), slowly=i < 10)


def test_a_claim_turned_around_is_refused(cases: list[Case]) -> None:
    for case in cases:
        data = bytearray(case.certificate)
        data[13] ^= 1
        with pytest.raises(RefutedError):
            check_certificate(case.formula, bytes(data))


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1)), max_size=60), st.integers(0, 2))
@settings(max_examples=250)
def test_any_numbers_end_in_an_error_or_a_true_claim(cases: list[Case], values: list[int], which: int) -> None:
    case = cases[which]
    case.proves_nothing_false(case.certificate[:46] + numbers(*values), slowly=False)


def test_a_certificate_is_of_one_formula(cases: list[Case]) -> None:
    with pytest.raises(CertificateError, match="of another question"):
        check_certificate(cases[0].formula, cases[1].certificate)
    n, hard, soft, weights = cases[2].parts
    other = WCNF.from_lists(hard, soft, [*weights[:-1], 8], n_variables=n)
    with pytest.raises(CertificateError, match="of another question"):
        check_certificate(other, cases[2].certificate)


def test_no_certificate_where_the_time_limit_strikes(tmp_path: Path) -> None:
    n, hard, soft, weights = hitting_sets()
    found = minimize(WCNF.from_lists(hard, soft, weights, n_variables=n), time_limit=0.2, certify=tmp_path / "c")
    assert not found.optimal and list(tmp_path.iterdir()) == []
