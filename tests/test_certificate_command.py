"""``clue solve --certify``, ``clue certificate check`` and refutations: what they print, and their exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from clue.cli import main
from clue.errors import CircuitError, FormulaError
from clue.logic import assign
from clue.logic.formula import as_wcnf
from clue.sat import WCNF, minimize, read_dimacs, refutation, write_wcnf
from clue.sat.refutation import cheaper, write_refutation

from .logic.test_assign import SEMANTICS, hitting_set, layered
from .logic.test_certificate import MIXES
from .oracles.logic import Nodes
from .oracles.sat import check_lrat, least_cost, satisfiable
from .sat.test_minimize import random_wcnf

QUESTION = {"nodes": ["embed", "h0", "h1", "h2", "logits"],
            "forget": {"facts": [["h0", "logits", "AND"], ["h1", "logits", "AND"], ["h2", "logits", "OR"]]},
            "retain": {"text": [["h0", "logits", "ADDER"], ["h1", "logits", "ADDER"], ["h2", "logits", "ADDER"]]},
            "weights": {"h0": 3, "h1": 2}}


def run(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr."""
    status = main(list(map(str, argv)))
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return status, captured.out, captured.err


def test_circuits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question, certificate = tmp_path / "q.json", tmp_path / "q.cert"
    question.write_text(json.dumps(QUESTION))
    status, out, _ = run(capsys, "solve", question, "--certify", certificate, "--lrat", tmp_path / "less")
    assert status == 30 and "\no 3\n" in out
    assert f"c {certificate.stat().st_size} bytes of certificate" in out
    status, out, err = run(capsys, "certificate", "check", question, certificate)
    assert (status, err) == (0, "")
    assert out.startswith("verified: no model costs less than 3, and one costs that\n1 are paid by propagation alone")
    status, out, _ = run(capsys, "certificate", "check", question, certificate, "--json")
    found = json.loads(out)
    assert status == 0 and found["verified"] and (found["cost"], found["root"], found["cores"]) == (3, 1, 1)
    assert "c cost 2 is refuted" in run(capsys, "solve", question, "--lrat", tmp_path / "less")[1]
    assert check_lrat(read_dimacs(tmp_path / "less.cnf").lists(), (tmp_path / "less.lrat").read_bytes(), True)

    data = bytearray(certificate.read_bytes())
    data[46] += 1
    certificate.write_bytes(data)
    status, out, _ = run(capsys, "certificate", "check", question, certificate)
    assert status == 1 and out == f"refuted: {certificate} does not prove its claim: the model costs 3, not 4\n"
    status, out, _ = run(capsys, "certificate", "check", question, certificate, "--json")
    assert status == 1 and json.loads(out)["verified"] is False


def test_what_cannot_be_checked_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    question, certificate = tmp_path / "q.json", tmp_path / "q.cert"
    question.write_text(json.dumps(QUESTION))
    run(capsys, "solve", question, "--certify", certificate)
    other, formula = tmp_path / "other.json", tmp_path / "a.wcnf"
    other.write_text(json.dumps(QUESTION | {"weights": {"h0": 3}}))
    formula.write_text("h 1 0\n2 -1 0\n")
    for argv, text in [
        ((other, certificate), "is of another question; give the certificate and the question it was made from"),
        ((question, certificate, "--semantics", "authors"), "is of another question"),
        ((formula, certificate), "is of another kind of question"), ((question, formula), "cut short|does not begin"),
        ((question, tmp_path / "none"), "none does not exist: write it with `clue solve --certify`"),
        ((tmp_path / "none.json", certificate), "none.json does not exist: check the path"),
            ((tmp_path / "q.txt", certificate), "expected a name"),
        ((formula, certificate, "--retain", "x"), "--retain goes with .json or .safetensors files only"),
        ((question, tmp_path), "Is a directory"),
    ]:
        status, out, err = run(capsys, "certificate", "check", *argv)
        assert status == 2 and out == "" and any(one in err for one in text.split("|")), err
    for option in ("--certify", "--lrat"):
        status, _, err = run(capsys, "solve", tmp_path / "a.cnf", option, "x")
        assert status == 2 and f"{option} goes with .wcnf or .json or .safetensors files only" in err
    status, out, err = run(capsys, "solve", question, "--certify", tmp_path / "none" / "c")
    assert status == 2 and f"there is no folder {tmp_path / 'none'}; make it first" in err and out == ""


def test_formulas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, certificate = tmp_path / "a.wcnf", tmp_path / "c"
    for text, status, claim in [
        ("h 1 2 0\n2 -1 0\n3 -2 0\n", 30, "no model costs less than 2, and one costs that"),
        ("h 1 0\nh -1 0\n1 2 0\n", 20, "there is no model"), ("h 1 0\n1 1 0\n", 30, "no model costs less than 0"),
    ]:
        path.write_text(text)
        found, out, _ = run(capsys, "solve", path, "--certify", certificate, "--lrat", tmp_path / "r")
        assert found == status and "bytes of certificate" in out
        assert ("is refuted" in out) == ("than 2" in claim)
        found, out, _ = run(capsys, "certificate", "check", path, certificate)
        assert found == 0 and out.startswith(f"verified: {claim}")
        certificate.unlink()
    assert "no refutation is written: nothing costs less than 0" in run(capsys, "solve", path, "--lrat", "x")[1]


def test_limits_leave_no_proof(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    forget, retain = hitting_set()
    write_wcnf(tmp_path / "a.wcnf", as_wcnf([forget], [retain]))  # type: ignore[list-item]
    with pytest.raises(CircuitError, match="semantics: expected 'support' or 'authors', got 'Authors'"):
        as_wcnf([forget], [retain], semantics="Authors")  # type: ignore[list-item]
    status, out, _ = run(capsys, "solve", tmp_path / "a.wcnf", "--time-limit", "0.3", "--certify", tmp_path / "c",
                         "--lrat", tmp_path / "r")
    assert status == 10 and "c no certificate is written" in out and "c no refutation is written" in out
    assert [path.name for path in tmp_path.iterdir()] == ["a.wcnf"]


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_exported_formula_has_the_same_optimum(semantics: str) -> None:
    rng = np.random.default_rng(6)
    for _ in range(40):
        n = int(rng.integers(3, 30))
        editable = rng.random(n) < 0.9
        editable[[0, -1]] = False
        graph = Nodes(n, editable)
        mix = MIXES[int(rng.integers(len(MIXES)))]
        sides = [[layered(rng, graph, 2.0, mix) for _ in range(int(rng.integers(1, 3)))] for _ in range(2)]
        weights = rng.integers(0, 5, n)
        found = assign(*sides, semantics=semantics, weights=weights)  # type: ignore[arg-type]
        formula = as_wcnf(*sides, semantics=semantics, weights=weights)  # type: ignore[arg-type]
        assert minimize(formula).cost == found.cost
        # The assignment is a model of it, at that cost.
        true = {2 * m + 1: found.retain_works[m] != 0 for m in range(n)} | {
            2 * m + 2: found.forget_works[m] == 1 or m == 0 for m in range(n)}
        assert all(any(true[abs(x)] == (x > 0) for x in clause) for clause in formula.hard_lists())
        assert found.cost == sum(int(weight) for clause, weight in zip(
            formula.soft_lists(), formula.weights, strict=True) if not any(true[abs(x)] == (x > 0) for x in clause))


def test_refutations_check_and_are_of_the_right_bound(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    refuted = 0
    for _ in range(60):
        n, hard, soft, weights = random_wcnf(rng)
        formula = WCNF.from_lists(hard, soft, weights, n_variables=n)
        least = least_cost(n, hard, soft, weights)
        if not least:
            continue
        assert write_refutation(formula, least, tmp_path / "r") is True
        clauses = read_dimacs(tmp_path / "r.cnf")
        assert check_lrat(clauses.lists(), (tmp_path / "r.lrat").read_bytes(), True)
        refuted += 1
        (tmp_path / "r.cnf").unlink()
        (tmp_path / "r.lrat").unlink()
        assert write_refutation(formula, least + 1, tmp_path / "r") is False  # the optimum itself
        assert list(tmp_path.iterdir()) == []
        bounded = cheaper(formula, least + 1)
        if bounded.n_variables < 14:
            assert satisfiable(bounded.n_variables, bounded.lists())
    assert refuted > 20


def test_large_refutations_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    formula = WCNF.from_lists([[1, 2]], [[-v] for v in range(1, 60)])
    assert len(cheaper(formula, 30)) > 1000
    monkeypatch.setattr(refutation, "MOST_CLAUSES", 1000)
    with pytest.raises(FormulaError, match="over 59 soft clauses takes more than 1000 clauses: it is for small"):
        cheaper(formula, 30)
    with pytest.raises(FormulaError, match="nothing costs less than 0"):
        write_refutation(formula, 0, "x")
