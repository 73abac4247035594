"""Certificates of assignments: two checkers that share no code, and nothing false that either accepts."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clue import _core
from clue.certificate import Verified, digest
from clue.errors import CertificateError, CircuitError, RefutedError
from clue.logic import _digest, assign, check_certificate, pose
from clue.types import Gate

from ..oracles import certificate as oracle
from ..oracles.logic import Edges, Nodes, circuit
from .test_assign import hitting_set, layered

SEMANTICS = ["support", "authors"]
MIXES = [(0.4, 0.4, 0.2), (0.1, 0.8, 0.1), (0.8, 0.1, 0.1), (0.45, 0.5, 0.05)]


class Case:
    """A question, the certificate of its answer, and the least cost."""

    def __init__(self, folder: Path, forget: Sequence[Edges], retain: Sequence[Edges], semantics: str = "support",
                 weights: np.ndarray | None = None) -> None:
        self.forget, self.retain, self.semantics = forget, retain, semantics
        self.weights = np.ones(forget[0].graph.n_nodes, np.int64) if weights is None else weights
        found = assign(forget, retain, semantics=semantics, weights=self.weights, certify=folder / "c")
        assert found.optimal
        self.cost, self.certificate = found.cost, (folder / "c").read_bytes()
        self.digest = _digest(pose(forget, retain, semantics=semantics, weights=self.weights))

    def check(self, certificate: bytes) -> Verified:
        return check_certificate(self.forget, self.retain, certificate, semantics=self.semantics, weights=self.weights)

    def check_slowly(self, certificate: bytes) -> int:
        return oracle.check_circuits(certificate, self.digest, self.forget, self.retain, self.semantics, self.weights)

    def proves_nothing_false(self, certificate: bytes, slowly: bool = True) -> bool:
        """Whether it is accepted; then its claim must hold, and the plain checker must accept it too."""
        try:
            accepted = self.check(certificate)
        except CertificateError:
            accepted = None
        if accepted is not None:
            assert accepted.cost == self.cost
        if slowly:
            try:
                assert self.check_slowly(certificate) == self.cost
            except oracle.Wrong:
                assert accepted is None, "the plain checker refuses what the fast one accepts"
        return accepted is not None


def random_case(rng: np.random.Generator, folder: Path, semantics: str, most: int = 40) -> Case:
    n = int(rng.integers(4, most))
    editable = rng.random(n) < 0.9
    editable[[0, -1]] = False
    graph = Nodes(n, editable)
    mix = MIXES[int(rng.integers(len(MIXES)))]
    sides = [[layered(rng, graph, 2.0, mix) for _ in range(int(rng.integers(1, 3)))] for _ in range(2)]
    weights = rng.integers(0, 9, n) if rng.random() < 0.5 else np.ones(n, np.int64)
    return Case(folder, *sides, semantics, weights)


def weighted_hitting_set(folder: Path, sets: int, leaves: int, largest: int, seed: int) -> Case:
    """Cores of several literals, strata, hardening and totalizers that are used again."""
    forget, retain = hitting_set(sets, leaves, seed)
    rng = np.random.default_rng(seed)
    return Case(folder, [forget], [retain], weights=rng.integers(1, largest + 1, forget.graph.n_nodes))


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("block", [0, 1, *(pytest.param(b, marks=pytest.mark.slow) for b in range(2, 10))])
def test_both_checkers_verify(tmp_path: Path, semantics: str, block: int) -> None:
    rng = np.random.default_rng([block, 3])
    cores = 0
    for _ in range(40):
        case = random_case(rng, tmp_path, semantics)
        found = case.check(case.certificate)
        assert found.cost == case.check_slowly(case.certificate) == case.cost
        assert found.satisfiable and found.size == len(case.certificate)
        cores += found.cores
    assert cores > 0


@pytest.mark.parametrize("largest", [1, 3, 1000])
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_searches_with_totalizers_verify(tmp_path: Path, largest: int, seed: int) -> None:
    case = weighted_hitting_set(tmp_path, 40, 24, largest, seed)
    found = case.check(case.certificate)
    assert found.cost == case.check_slowly(case.certificate) == case.cost
    assert found.cores > 2 and found.clauses > 0
    kinds = step_kinds(case)
    assert {2, 3} <= kinds  # cores, and totalizers that were used
    assert largest != 3 or seed != 0 or 4 in kinds


def test_hardening_is_covered(tmp_path: Path) -> None:
    kinds = set()
    for seed in range(6):
        case = weighted_hitting_set(tmp_path, 20, 16, 40, seed)
        assert case.check(case.certificate).cost == case.check_slowly(case.certificate) == case.cost
        kinds |= step_kinds(case)
    assert 5 in kinds


def step_kinds(case: Case) -> set[int]:
    """Kinds of steps in a certificate of one or more sections, read by the layout."""
    stream = oracle.Reader(case.certificate[46:])
    stream.number()
    stream.bytes((2 * case.forget[0].graph.n_nodes + 7) // 8)
    found = set()
    for _ in range(stream.number()):
        stream.number()
        for _ in range(2 * stream.number()):
            stream.number()
        while kind := stream.number():
            found.add(kind)
            for _ in range({2: 1, 3: 2, 4: 1, 5: 1}.get(kind, 0)):
                stream.number()
            for _ in range(2 if kind < 3 else 0):
                for _ in range(stream.number()):
                    stream.number()
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """Small certificates with every kind of step between them."""
    folder = tmp_path_factory.mktemp("cases")
    rng = np.random.default_rng(8)
    found = [weighted_hitting_set(folder, 20, 14, 6, 1), weighted_hitting_set(folder, 40, 24, 1, 0)]
    assert set.union(*map(step_kinds, found)) == {1, 2, 3, 5}
    for semantics in SEMANTICS:
        while not (one := random_case(rng, folder, semantics)).check(one.certificate).cores:
            pass
        found.append(one)
    return found


def changed(certificate: bytes, rng: np.random.Generator) -> bytes:
    """A certificate with some bytes flipped, replaced, dropped, doubled, swapped or cut off; most are of its proof."""
    data = bytearray(certificate)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(46 if rng.random() < 0.97 else 0, max(len(data), 47)))
        at = min(at, len(data) - 1)
        kind = rng.integers(7)
        if kind == 0:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            data[at] = int(rng.integers(6))
        elif kind == 2:
            del data[at:at + int(rng.integers(1, 6))]
        elif kind == 3:
            data[at:at] = data[at:at + int(rng.integers(1, 9))]
        elif kind == 4:
            data[at] = (data[at] + int(rng.choice([-2, -1, 1, 2]))) % 256
        elif kind == 5:
            other = int(rng.integers(46, len(data))) if len(data) > 47 else 0
            data[at], data[other] = data[other], data[at]
        else:
            del data[at:]
        if not data:
            return b""
    return bytes(data)


@pytest.mark.parametrize("block", [0, *(pytest.param(b, marks=pytest.mark.slow) for b in range(1, 6))])
def test_changed_certificates_prove_nothing_false(cases: list[Case], block: int) -> None:
    rng = np.random.default_rng([block, 4])
    accepted = 0
    for case in cases:
        for i in range(600):
            accepted += case.proves_nothing_false(changed(case.certificate, rng), slowly=i < 20)
    assert 0 < accepted < 400  # a bit of the model that does not matter, and the like


def test_no_changed_bit_proves_anything_false(cases: list[Case]) -> None:
    for case in cases:
        step = 1 + len(case.certificate) // 400
        for at in range(0, len(case.certificate), step):
            for bit in range(8):
                data = bytearray(case.certificate)
                data[at] ^= 1 << bit
                case.proves_nothing_false(bytes(data), slowly=False)
        for size in range(0, len(case.certificate), step):
            with pytest.raises(CertificateError):
                case.check(case.certificate[:size])
        with pytest.raises(RefutedError, match="there is more after its end"):
            case.check(case.certificate + b"\0")


def numbers(*values: int) -> bytes:
    """LEB128."""
    found = bytearray()
    for value in values:
        while value > 0x7F:
            found.append(value & 0x7F | 0x80)
            value >>= 7
        found.append(value)
    return bytes(found)


@given(st.lists(st.one_of(st.integers(0, 9), st.integers(0, 2**64 - 1)), max_size=60), st.binary(max_size=20),
       st.integers(0, 3), st.booleans())
@settings(max_examples=250)
def test_any_bytes_end_in_an_error_or_a_true_claim(cases: list[Case], values: list[int], tail: bytes, which: int,
                                                   keep_model: bool) -> None:
    case = cases[which]
    start = 46
    if keep_model:
        stream = oracle.Reader(case.certificate[46:])
        stream.number()
        start += stream.at + (2 * case.forget[0].graph.n_nodes + 7) // 8
    case.proves_nothing_false(case.certificate[:start] + numbers(*values) + tail, slowly=False)


def test_sizes_beyond_the_file_take_no_memory(cases: list[Case]) -> None:
    case = cases[0]
    stream = oracle.Reader(case.certificate[46:])
    stream.number()
    start = 46 + stream.at + (2 * case.forget[0].graph.n_nodes + 7) // 8
    model = case.certificate[:start]
    huge = 2**62 - 1
    for tail, text in [
        (numbers(huge), "it is cut short"), (numbers(2**64 - 1), "it is cut short"),
        (b"\xff" * 9 + b"\x02", "a number is too large"), (numbers(1, 2**62), "a number is too large"),
        (numbers(1, 1, huge), "it is cut short"), (numbers(1, 1, 0, 1, huge), "it is cut short"),
        (numbers(1, 1, 1, 2 * huge, 0), "there is no such node"), (numbers(1, 1, 0, 9, 0), "an unknown kind"),
        (numbers(1, 1, 0, 3, 2, 1, 0), "a literal has no such variable"),
        (numbers(1, 1, 0, 1, 0, 1, 1, 0), "a hint names no clause before it"),
        (numbers(1, 1, 0, 1, 0, 0, 0), "does not follow from its hints"),
        (numbers(1, 1, 0, 0), "cores weigh 0 of 1"), (numbers(0), f"costs {case.cost}, but 0 is proven"),
    ]:
        with pytest.raises(RefutedError, match=text):
            case.check(model + tail)


def test_a_model_that_costs_more_is_refused(cases: list[Case]) -> None:
    case = cases[0]
    n = case.forget[0].graph.n_nodes
    stream = oracle.Reader(case.certificate[46:])
    stream.number()
    proof = case.certificate[46 + stream.at + (2 * n + 7) // 8:]
    everything = bytearray(b"\xff" * ((2 * n + 7) // 8))
    everything[0] &= 0b11111101  # the embedding is never dead
    most = int(case.weights[case.forget[0].graph.editable].sum())
    for cost, text in ((most, f"costs {most}, but {case.cost} is proven"), (case.cost, f"costs {most}, not")):
        data = case.certificate[:46] + numbers(cost) + bytes(everything) + proof
        with pytest.raises(RefutedError, match=text):
            case.check(data)
        with pytest.raises(oracle.Wrong):
            case.check_slowly(data)
    with pytest.raises(RefutedError, match="breaks a rule of the forget circuits"):
        case.check(case.certificate[:46] + numbers(0) + bytes(len(everything)) + proof)


def test_a_certificate_is_of_one_question(cases: list[Case], tmp_path: Path) -> None:
    case, other = cases[0], cases[1]
    for certificate, text in [
        (other.certificate, "it is of another question"), (b"", "cut short|does not begin"), (b"CLUECERX" + b"0" * 60,
                                                                                  "does not begin"),
        (case.certificate[:8] + b"\1\0\0\0" + case.certificate[12:], "its version is 1, not 2"),
        (case.certificate[:12] + b"\2" + case.certificate[13:], "of another kind of question"),
    ]:
        with pytest.raises(CertificateError, match=text) as caught:
            case.check(certificate)
        assert not isinstance(caught.value, RefutedError)
    with pytest.raises(RefutedError, match="there always is one"):
        case.check(case.certificate[:13] + b"\0" + case.certificate[14:])
    with pytest.raises(CertificateError, match="another question"):
        check_certificate(case.forget, case.retain, case.certificate, semantics="authors", weights=case.weights)
    with pytest.raises(CertificateError, match="none does not exist"):
        check_certificate(case.forget, case.retain, tmp_path / "none", weights=case.weights)


arrays = st.lists(hnp.arrays(st.sampled_from([np.uint8, np.int32, np.int64]), st.integers(0, 40)), max_size=4)


@settings(max_examples=60)
@given(arrays)
def test_the_digest_is_as_the_format_says(given: list[np.ndarray]) -> None:
    assert digest("kind", given) == oracle.digest("kind", given)
    assert digest("another", given) != digest("kind", given)


@settings(max_examples=60)
@given(arrays, st.randoms(use_true_random=False))
def test_one_bit_makes_another_digest(given: list[np.ndarray], random: Any) -> None:
    before = digest("kind", given)
    assert digest("kind", [*given, np.zeros(0, dtype=np.int32)]) != before
    for i, array in enumerate(given):
        assert digest("kind", [*given[:i], np.append(array, array.dtype.type(0)), *given[i + 1:]]) != before
        if len(array):
            other = array.copy()
            bits = other.view(np.uint8)
            bits[random.randrange(len(bits))] ^= 1 << random.randrange(8)
            assert digest("kind", [*given[:i], other, *given[i + 1:]]) != before


def test_a_checksum_of_what_is_no_flat_array_is_refused() -> None:
    for values in (np.zeros((2, 2)), np.zeros(6)[::2]):
        with pytest.raises(ValueError, match="^values: expected one contiguous dimension$"):
            _core.checksum(values)


def test_no_certificate_where_the_time_limit_strikes(tmp_path: Path) -> None:
    forget, retain = hitting_set()
    assert not assign([forget], [retain], time_limit=0.2, certify=tmp_path / "c").optimal
    assert list(tmp_path.iterdir()) == []


def test_certificates_go_without_pins(tmp_path: Path) -> None:
    forget, retain = hitting_set(sets=3, leaves=10)
    for pins in ({"never": [1]}, {"must": ["node 1"]}):
        with pytest.raises(CircuitError, match="certify goes without never and must"):
            assign([forget], [retain], certify=tmp_path / "c", **pins)
    assert not list(tmp_path.iterdir())


def test_certifying_changes_nothing(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    n = 300
    editable = np.ones(n, bool)
    editable[[0, -1]] = False
    graph = Nodes(n, editable)
    forget, retain = (layered(rng, graph, 1.8, (0.45, 0.45, 0.1)) for _ in range(2))
    score = rng.random(n)
    plain = assign([forget], [retain], retain_score=score, forget_score=score)
    found = assign([forget], [retain], retain_score=score, forget_score=score, certify=tmp_path / "c")
    again = assign([forget], [retain], certify=tmp_path / "d")
    assert np.array_equal(plain.role, found.role) and plain.cost == again.cost
    assert check_certificate([forget], [retain], tmp_path / "c").cost == plain.cost
    first = (tmp_path / "c").read_bytes()
    assign([forget], [retain], retain_score=score, forget_score=score, certify=tmp_path / "c")
    assert (tmp_path / "c").read_bytes() == first


FULL = """
import resource, sys
import numpy as np
sys.path.insert(0, {tests!r})
from clue.logic import assign
from tests.logic.test_assign import hitting_set
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))
forget, retain = hitting_set(12, 40)
try:
    assign([forget], [retain], certify=sys.argv[1])
except OSError as error:
    print(type(error).__name__)
"""


def test_a_disk_that_fills_is_told_and_no_half_file_stays(tmp_path: Path) -> None:
    # The limit on file sizes stands in for a full disk: write() fails the same way.
    path = tmp_path / "c"
    path.write_bytes(b"earlier")
    run = subprocess.run([sys.executable, "-c", FULL.format(tests=str(Path(__file__).parents[2])), str(path)],
                         capture_output=True, text=True, timeout=120,
                         env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == ["OSError"]
    assert path.read_bytes() == b"earlier" and list(tmp_path.iterdir()) == [path]


def test_duplicate_edges_and_shared_names_are_one_question_each(tmp_path: Path) -> None:
    """The same edge with two gates, in two circuits, and told twice."""
    graph = Nodes(6, np.array([0, 1, 1, 1, 1, 0], bool))
    forget = [circuit(graph, [(1, 4, Gate.AND), (2, 4, Gate.AND), (1, 4, Gate.AND), (4, 5, Gate.OR)]),
              circuit(graph, [(1, 4, Gate.OR), (3, 5, Gate.AND), (1, 5, Gate.AND), (0, 5, Gate.AND)])]
    retain = [circuit(graph, [(1, 5, Gate.ADDER), (2, 5, Gate.OR), (3, 5, Gate.OR), (4, 5, Gate.ADDER)]),
              circuit(graph, [(3, 5, Gate.OR), (2, 5, Gate.OR), (2, 4, Gate.ADDER)])]
    for semantics in SEMANTICS:
        case = Case(tmp_path, forget, retain, semantics)
        assert case.check(case.certificate).cost == case.check_slowly(case.certificate) == case.cost
