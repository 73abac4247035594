"""``clue solve``: the lines and exit codes of the competitions, for every kind of file."""

from __future__ import annotations

import _thread
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clue import _core
from clue.circuit.graph import Circuit, Graph
from clue.circuit.interchange import write_eap_ig
from clue.cli import main
from clue.sat import CNF, WCNF, write_dimacs, write_wcnf
from clue.types import Gate, NodeKind, Provenance, Role

from .oracles.sat import check_drat, check_lrat, holds, least_cost, satisfiable
from .sat.test_minimize import hitting_sets, random_wcnf
from .sat.test_solver import pigeons


def solve(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, list[str]]:
    """Exit status, and the lines that are no comments."""
    status = main(["solve", *map(str, argv)])
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert all(line[:2] in ("c ", "s ", "v ", "o ") for line in lines)
    return status, [line for line in lines if not line.startswith("c ")]


def command(path: Path) -> subprocess.Popen[str]:
    """The same in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "clue.cli", "solve", str(path)], text=True, stdout=subprocess.PIPE,
                            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)})


def failure(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> str:
    """The sentence with which the command refuses."""
    assert main(["solve", *map(str, argv)]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return captured.err.removeprefix("clue: error: ").strip()


def values(lines: list[str]) -> list[bool]:
    """The model of ``v`` lines of literals; entry 0 is unused."""
    words = [word for line in lines if line.startswith("v ") for word in line.split()[1:]]
    assert words[-1] == "0"
    literals = [int(word) for word in words[:-1]]
    assert [abs(literal) for literal in literals] == list(range(1, len(literals) + 1))
    return [False, *(literal > 0 for literal in literals)]


def test_cnf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    answers = set()
    for seed in range(30):
        n, clauses = 8, [[int(v * rng.choice([-1, 1])) for v in rng.integers(1, 9, 3)] for _ in range(25 + seed)]
        path = tmp_path / "a.cnf"
        write_dimacs(path, CNF.from_lists(clauses, n_variables=n))
        status, lines = solve(capsys, path)
        answers.add(status)
        if satisfiable(n, clauses):
            assert status == 10 and lines[0] == "s SATISFIABLE"
            model = values(lines)
            assert all(holds(clause, model) for clause in clauses)
        else:
            assert (status, lines) == (20, ["s UNSATISFIABLE"])
    assert answers == {10, 20}


def test_cnf_limits_assumptions_and_compression(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "A.CNF.gz"
    write_dimacs(tmp_path / "a.cnf", CNF.from_lists(pigeons(12)))
    path.write_bytes(gzip.compress((tmp_path / "a.cnf").read_bytes()))
    assert solve(capsys, path, "--time-limit", "0.2") == (0, ["s UNKNOWN"])
    write_dimacs(tmp_path / "b.cnf", CNF.from_lists([[1, 2], [-1, 2], [-3, 4]], n_variables=2**31 - 1))
    status, lines = solve(capsys, tmp_path / "b.cnf", "--assume", "3", "1")
    assert status == 10 and values(lines)[1] and values(lines)[3:] == [True, True]
    assert main(["solve", str(tmp_path / "b.cnf"), "--assume", "3", "-2", "--assume", "1"]) == 20
    assert capsys.readouterr().out.splitlines()[-2:] == ["c core of the assumptions: -2", "s UNSATISFIABLE"]
    (tmp_path / "c.cnf").write_text("p cnf 0 0\n")
    assert solve(capsys, tmp_path / "c.cnf") == (10, ["s SATISFIABLE", "v 0"])


@pytest.mark.parametrize("options", [[], ["--proof-text"], ["--proof-format", "lrat"],
                                     ["--proof-format", "lrat", "--proof-text"]])
def test_proofs(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    clauses = pigeons(4)
    write_dimacs(tmp_path / "a.cnf", CNF.from_lists(clauses))
    assert solve(capsys, tmp_path / "a.cnf", "--proof", tmp_path / "p", *options) == (20, ["s UNSATISFIABLE"])
    check = check_lrat if "lrat" in options else check_drat
    assert check(clauses, (tmp_path / "p").read_bytes(), "--proof-text" not in options)
    write_dimacs(tmp_path / "a.cnf", CNF.from_lists(clauses[1:]))
    assert solve(capsys, tmp_path / "a.cnf", "--proof", tmp_path / "q", *options)[0] == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.cnf", "p"]


@pytest.mark.parametrize("header", [False, True])
def test_wcnf(tmp_path: Path, capsys: pytest.CaptureFixture[str], header: bool) -> None:
    rng = np.random.default_rng(4)
    answers = set()
    for _ in range(40):
        n, hard, soft, weights = random_wcnf(rng)
        write_wcnf(tmp_path / "a.wcnf", WCNF.from_lists(hard, soft, weights, n_variables=n), header=header)
        status, lines = solve(capsys, tmp_path / "a.wcnf")
        answers.add(status)
        least = least_cost(n, hard, soft, weights)
        if least is None:
            assert (status, lines) == (20, ["s UNSATISFIABLE"])
            continue
        end = lines.index("s OPTIMUM FOUND")
        costs = [int(line.removeprefix("o ")) for line in lines[:end]]
        assert status == 30 and costs[-1] == least and costs == sorted(set(costs), reverse=True)
        model = values(lines) if header else [False, *(bit == "1" for bit in lines[end + 1][2:])]
        model += [False] * (n + 1 - len(model))
        assert all(holds(clause, model) for clause in hard)
        assert sum(w for c, w in zip(soft, weights, strict=True) if not holds(c, model)) == least
    assert answers == {20, 30}


def test_wcnf_limit_prints_the_best_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leaves, hard, soft, weights = hitting_sets()
    write_wcnf(tmp_path / "a.wcnf", WCNF.from_lists(hard, soft, weights))
    assert main(["solve", str(tmp_path / "a.wcnf"), "--time-limit", "0.3"]) == 10
    lines = capsys.readouterr().out.splitlines()
    end = lines.index("s SATISFIABLE")
    assert lines[1].startswith("o ")
    lower, upper = map(int, lines[end - 1].removeprefix("c bounds ").split(",")[0].split(".."))
    assert 0 < lower < upper <= leaves and upper == lines[end + 1].count("1")
    assert [line for line in lines if line.startswith("o ")][-1] == f"o {upper}"


def hard_question() -> dict[str, object]:
    """Forget must kill one of eight leaves in each of 300 sets, retain needs all 120: far from solved in a minute."""
    leaves, hard, _, _ = hitting_sets()
    nodes = ["in", *(f"x{v}" for v in range(1, leaves + 1)), *(f"s{i}" for i in range(len(hard))), "out"]
    kill = [[f"x{v}", f"s{i}", "AND"] for i, clause in enumerate(hard) for v in clause]
    kill += [[f"s{i}", "out", "OR"] for i in range(len(hard))]
    return {"nodes": nodes, "editable": nodes[1:leaves + 1], "forget": {"kill": kill},
            "retain": {"keep": [[node, "out", "AND"] for node in nodes[1:leaves + 1]]}}


def test_circuits_at_the_limit_give_the_best_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(hard_question()))
    status, lines = solve(capsys, path, "--time-limit", "0.3")
    assert status == 10 and "s SATISFIABLE" in lines
    costs = [int(line[2:]) for line in lines if line.startswith("o ")]
    assert costs[-1] == sum(line.startswith("v conflict ") for line in lines)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("name", ["a.wcnf", "a.json"])
def test_signals_end_a_search_with_the_best_so_far(tmp_path: Path, name: str, number: signal.Signals) -> None:
    _, hard, soft, weights = hitting_sets()
    path = tmp_path / name
    if name == "a.wcnf":
        write_wcnf(path, WCNF.from_lists(hard, soft, weights))
    else:
        path.write_text(json.dumps(hard_question()))
    costs: list[int] = []
    with command(path) as process:
        assert process.stdout is not None
        while not costs or costs[-1] == 120:  # 120 is known before any search: all leaves die
            line = process.stdout.readline()
            costs += [int(line[2:])] if line.startswith("o ") else []
        process.send_signal(number)
        lines = process.stdout.read().splitlines()
    assert process.returncode == 10 and "s SATISFIABLE" in lines
    costs += [int(line[2:]) for line in lines if line.startswith("o ")]
    assert any(line.startswith("c bounds ") and f"..{costs[-1]}, gap " in line for line in lines)
    assert costs == sorted(set(costs), reverse=True)


@pytest.mark.parametrize(("limits", "known"), [([], True), (["--most", "1"], False)])
def test_ctrl_c_ends_surgery_with_the_best_so_far(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                                  monkeypatch: pytest.MonkeyPatch, limits: list[str], known: bool) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(hard_question()))
    native = _core.operate

    def interrupted(**question: Any) -> dict[str, Any]:
        threading.Timer(0.5, _thread.interrupt_main).start()
        return native(**question)

    monkeypatch.setattr(_core, "operate", interrupted)
    status, lines = solve(capsys, path, "--surgical", *limits)
    if not known:  # the best so far edits more than one node
        assert (status, lines) == (0, ["s UNKNOWN"])
        return
    assert (status, lines[1]) == (10, "s SATISFIABLE")
    dead = {line.removeprefix("v conflict ") for line in lines if line.startswith("v conflict ")}
    assert lines[0] == f"o {len(dead)}" and all(dead & {f"x{v}" for v in clause} for clause in hitting_sets()[1])


def test_signals_and_limits_before_anything_is_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.wcnf"
    os.mkfifo(path)  # reading it waits for a writer that never comes
    assert solve(capsys, path, "--time-limit", "0.2") == (0, ["s UNKNOWN"])
    process = command(path)
    with open(path, "wb"):  # opens once the command has begun to read
        process.send_signal(signal.SIGTERM)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (0, "s UNKNOWN\n")


def test_signals_are_left_as_they_were(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also after a refusal, before which nobody asked for the time left: the alarm would end a program that goes on."""
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)]
    good, bad = tmp_path / "a.cnf", tmp_path / "b.cnf"
    good.write_text("p cnf 1 1\n1 0\n")
    bad.write_text("p cnf 1 1\n1\n")
    assert solve(capsys, good, "--time-limit", "1e300")[0] == 10  # longer than any clock of the system runs
    assert "the file ends within a clause" in failure(capsys, bad, "--time-limit", "1000")
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGALRM)] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_holds_in_a_thread_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No signal goes there."""
    _, hard, soft, weights = hitting_sets()
    write_wcnf(tmp_path / "a.wcnf", WCNF.from_lists(hard, soft, weights))
    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(main(["solve", str(tmp_path / "a.wcnf"), "--time-limit", "0.3"])),
                              daemon=True)
    thread.start()
    thread.join(60)
    assert found == [10] and "s SATISFIABLE" in capsys.readouterr().out


QUESTION = {"nodes": ["embed", "h0", "h1", "h2", "logits"],
            "forget": {"facts": [["embed", "h0", "ADDER"], ["h0", "logits", "AND"], ["h1", "logits", "AND"]]},
            "retain": {"text": [["h0", "logits", "ADDER"], ["h1", "logits", "ADDER"], ["h2", "logits", "ADDER"]]},
            "weights": {"h1": 3, "h0": 2}}


def test_question(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "question.json"
    path.write_text(json.dumps(QUESTION))
    roles = ["v free embed", "v conflict h0", "v retain h1", "v retain h2", "v free logits"]
    assert solve(capsys, path) == (30, ["o 5", "o 2", "s OPTIMUM FOUND", *roles])
    assert solve(capsys, path, "--semantics", "authors")[0] == 30
    path.write_text(json.dumps(QUESTION | {"editable": ["h1", "h2"]}))
    assert "o 0" in solve(capsys, path)[1]
    assert "has its own retain circuits" in failure(capsys, path, "--retain", path)
    path.write_text(json.dumps(QUESTION | {"retain": {}}))
    assert "there is no retain circuit" in failure(capsys, path)
    path.write_text(json.dumps(QUESTION | {"retain": {"text": [["h1", "h0", "OR"], ["h0", "logits", "OR"]]}}))
    assert "edge h1 -> h0 closes a cycle" in failure(capsys, path)


def test_explanations_pins_and_surgery(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "question.json"
    path.write_text(json.dumps(QUESTION))
    assert main(["solve", str(path), "--explain", "h0", "--explain", "h2"]) == 30
    out = capsys.readouterr().out.splitlines()
    for line in ("c h0 is conflict, chosen; a conflict in every assignment of least cost",
                 "c these gates leave the choice between it and h1:", "c   forget facts: logits = AND(h0, h1)",
                 "c   retain text: logits = ADDER(h0, h1, h2)", "c as retain: cost 3 (+1), h1 conflict",
                 "c h2 is retain", "c as free: impossible"):
        assert line in out
    assert solve(capsys, path, "--never", "h0")[1][0] == "o 3"
    assert solve(capsys, path, "--must", "h1", "--must", "h0")[1][0] == "o 5"
    assert solve(capsys, path, "--surgical")[1][:3] == ["o 2", "s OPTIMUM FOUND", "v free embed"]
    assert solve(capsys, path, "--surgical", "--budget", "2", "--most", "1")[1][0] == "o 2"
    for argv, expected in [
        (["--surgical", "--budget", "1"], "at most 1 weight of edits: the least that would do is 2"),
        (["--never", "h0", "--never", "h1"], "no assignment kills the forget outputs with never h0, h1"),
        (["--budget", "1"], "--budget and --most go with --surgical only"),
        (["--surgical", "--budget", "-1"], "argument --budget: invalid whole number value: '-1'"),
        (["--surgical", "--semantics", "authors"], "leave --semantics out"),
        (["--surgical", "--explain", "h0"], "--explain goes without --surgical"),
        (["--explain", "h9"], "--explain: there is no node 'h9'"),
        *([[option, str(tmp_path / "proof"), *other], "--certify and --lrat go without --surgical, --never and --must"]
          for option in ("--certify", "--lrat") for other in (["--surgical"], ["--never", "h0"], ["--must", "h0"])),
    ]:
        assert expected in failure(capsys, path, *argv)
    assert list(tmp_path.iterdir()) == [path]


def test_the_semantics_are_those_of_explanations_and_refutations_too(tmp_path: Path,
                                                                     capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "question.json"
    path.write_text(json.dumps({"nodes": ["embed", "a", "logits"], "forget": {"f": [["a", "logits", "OR"]]},
                                "retain": {"r": [["embed", "a", "AND"], ["embed", "logits", "OR"], ["a", "logits", "OR"]]}}))
    asked = ("--explain", "a", "--lrat", str(tmp_path / "r"))
    assert main(["solve", str(path), *asked]) == 30
    out = capsys.readouterr().out.splitlines()
    assert {"o 0", "c a is forget", "c no refutation is written: nothing costs less than 0"} <= {*out}
    assert main(["solve", str(path), *asked, "--semantics", "authors"]) == 30
    out = capsys.readouterr().out.splitlines()
    assert {"o 1", "c a is conflict, forced by the outputs; a conflict in every assignment of least cost",
            "c as forget: impossible"} <= {*out}
    assert any(line.startswith("c cost 0 is refuted") for line in out)


def test_an_answer_stands_whatever_follows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str],
                                              monkeypatch: pytest.MonkeyPatch) -> None:
    from clue.sat import refutation

    monkeypatch.setattr(refutation, "MOST_CLAUSES", 0)  # of a formula that is too large for one
    question, formula = tmp_path / "question.json", tmp_path / "a.wcnf"
    question.write_text(json.dumps(QUESTION))
    formula.write_text("h 1 2 0\n2 -1 0\n3 -2 0\n")
    for path in (question, formula):
        assert main(["solve", str(path), "--lrat", str(tmp_path / "r")]) == 30
        lines = capsys.readouterr().out.splitlines()
        assert lines.index("s OPTIMUM FOUND") < len(lines) - 1
        assert lines[-1].startswith("c a refutation of cost 1 over") and "takes more than 0 clauses" in lines[-1]
    monkeypatch.setattr(refutation, "write_refutation", lambda *given, **named: signal.raise_signal(signal.SIGTERM))
    assert main(["solve", str(formula), "--lrat", str(tmp_path / "r")]) == 30
    assert capsys.readouterr().out.splitlines()[-3:] == ["s OPTIMUM FOUND", "v 10", "c stopped"]


def test_circuit_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    graph = Graph(n_layers=2, n_heads=2, n_kv_heads=2, d_mlp=4, neurons=False)
    heads = np.flatnonzero(graph.kind == NodeKind.HEAD)

    def circuit(name: str, gate: Gate) -> Circuit:
        n = len(heads)
        return Circuit(name, graph, heads.astype(np.int32), np.full(n, graph.logits, np.int32),
                       np.full(n, gate, np.uint8), np.full(n, Provenance.BOTH, np.uint8), np.ones(n), np.ones(n))

    forget, retain = circuit("forget", Gate.AND), circuit("retain", Gate.ADDER)
    for ending in ("json", "safetensors"):
        for one in (forget, retain):
            if ending == "json":
                write_eap_ig(tmp_path / f"{one.name}.json", one)
            else:
                one.save(tmp_path / f"{one.name}.safetensors")
        status, lines = solve(capsys, tmp_path / f"forget.{ending}", "--retain", tmp_path / f"retain.{ending}")
        assert (status, lines[:3]) == (30, [f"o {len(heads)}", "o 1", "s OPTIMUM FOUND"])
        assert len(lines) == 3 + graph.n_nodes
        assert [line.split()[2] for line in lines[3:]] == list(graph.names)
        assert [line for line in lines if line.startswith("v conflict")] == [f"v conflict {graph.name(heads[-1])}"]
        assert {line.split()[1] for line in lines[3:]} <= {role.name.lower() for role in Role}
        assert "is one circuit: give at least one other with --retain" in failure(capsys, tmp_path / f"forget.{ending}")
    # A file of EAP-IG itself: flags only, and every edge an ADDER.
    for name in ("forget.json", "retain.json"):
        data = json.loads((tmp_path / name).read_text())
        del data["clue"]
        (tmp_path / name).write_text(json.dumps(data))
    assert solve(capsys, tmp_path / "forget.json", "--retain", tmp_path / "retain.json")[1][0] == f"o {len(heads)}"


def test_refusals_are_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cnf, wcnf, text = tmp_path / "a.cnf", tmp_path / "a.wcnf", tmp_path / "a.json"
    cnf.write_text("p cnf 2 1\n1 2\n")
    wcnf.write_text("h 1 0\n-3 1 0\n")
    text.write_text("[")
    for argv, expected in [
        ([cnf], f"{cnf}: line 3: the file ends within a clause: its 0 is missing"),
        ([wcnf], f"{wcnf}: line 2: expected a weight or 'h', got '-3'"),
        ([text], f"{text} is not JSON"),
        ([tmp_path / "none.cnf"], "No such file or directory"),
        (["a.txt"], "a.txt: expected a name that ends in .cnf, .wcnf, .json or .safetensors"),
        ([wcnf, "--assume", "1"], "--assume goes with .cnf or .dimacs files only"),
        ([wcnf, "--proof", "p"], "--proof goes with .cnf or .dimacs files only"),
        ([cnf, "--retain", "p"], "--retain goes with .json or .safetensors files only"),
        ([cnf, "--time-limit", "0"], "argument --time-limit: invalid number of seconds value: '0'"),
        ([cnf, "--time-limit", "nan"], "invalid number of seconds"),
        ([cnf, "--assume", "0"], "argument --assume: invalid literal value: '0'"),
    ]:
        assert expected in failure(capsys, *argv)
    text.write_text('{"cfg": {"n_layers": "x"}}')
    refusal = failure(capsys, text, "--retain", text)
    assert "is neither a question (clue.logic.question) nor a circuit of EAP-IG" in refusal
    cnf.write_text("p cnf 2147483647 1\n2147483647 0\n")
    assert "a.cnf: variable 2147483647 needs tables of about" in failure(capsys, cnf)
    cnf.write_text("p cnf 1 1\n1 0\n")
    assert f"there is no folder {tmp_path / 'none'}; make it first" in failure(capsys, cnf, "--proof", tmp_path / "none" / "p")
    # Circuits are read as they are; a compressed one is not taken for a circuit.
    assert "expected a name that ends in" in failure(capsys, tmp_path / "question.json.gz")
