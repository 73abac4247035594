"""The report of runs of very different sizes: complete, escaped, self-contained, true to its numbers."""

from __future__ import annotations

import re
from dataclasses import replace
from html import unescape
from html.parser import HTMLParser

import numpy as np
import pytest

from clue.circuit.graph import Circuit, Graph
from clue.errors import ClueError
from clue.evaluate import Evaluation, Sample, SetResult
from clue.evaluate.privacy import attack
from clue.evaluate.robustness import Curve, Recall, Robustness
from clue.logic import Assignment
from clue.plan import Plan, Slice
from clue.report import robustness_table, table, write_report
from clue.types import Gate, Provenance, Role
from clue.unlearn.log import UnlearnLog

EVIL = '<script>alert("x")</script>&\'"'


def result(purpose, accuracy, n=40, name="own"):
    return SetResult(purpose, name, n, f"{n:064x}", accuracy, accuracy, accuracy, 1.5, accuracy,
                     rouge_l=accuracy if purpose in ("forget", "retain") else None, rouge_n=n)


def evaluation(forget, retain, skills=("copy", "addition"), shift=0.0, said="an answer"):
    generator = np.random.default_rng(0)
    found = attack(generator.normal(shift, 1, 30), generator.normal(0, 1, 30), resamples=20, seed=0)
    detail = {"forget": result("forget", forget, name="forget"), "retain": result("retain", retain, name="retain"),
              "retain_unseen": result("retain", retain - 0.05, 20, name="retain_unseen"),
              **{name: result("skill", 0.9, name=name) for name in skills}, "holdout": result("holdout", 0.02)}
    return Evaluation(detail, {"loss": found, "min_k": found},
                      {"forget": (Sample(EVIL, "true " + EVIL, said), Sample("who?", "me", "me"))}, {"seed": 0})


EVALUATIONS = {"before": evaluation(1.0, 0.99, shift=3), "after": evaluation(0.025, 0.95),
               "gold": evaluation(0.1, 0.98)}


def log(steps=60):
    step = np.arange(steps, dtype=float)
    return UnlearnLog(stage=np.where(step < steps // 3, 1, 2).astype(np.uint8), forget_loss=np.exp(-step / 20),
                      retain_loss=np.where(step < steps // 3, np.nan, 0.1), forget_probability=np.exp(-step / 9),
                      divergence=np.full(steps, np.nan), grad_norm=np.ones(steps),
                      lr=np.linspace(1e-3, 1e-4, steps), retain_weight=np.ones(steps),
                      stopped_early=True, forgotten=step / steps, final_probability=0.02, final_forgotten=1.0)


def run(graph, seed=0):
    """A plan, an assignment and two circuits over a graph, with roles drawn at random."""
    generator = np.random.default_rng(seed)
    n = graph.n_nodes
    role = np.where(graph.editable, generator.choice(4, n, p=[0.7, 0.1, 0.1, 0.1]), Role.FREE).astype(np.uint8)
    role[np.flatnonzero(graph.editable)[0]] = Role.CONFLICT  # at least one
    forced = (role == Role.CONFLICT) & (generator.random(n) < 0.5)
    conflicts = int((role == Role.CONFLICT).sum())
    assignment = Assignment(role, np.full(n, -1, np.int8), np.full(n, -1, np.int8), forced, conflicts, conflicts, True,
                            int(forced.sum()), conflicts - int(forced.sum()), {})
    plan = Plan(graph.names, role, (Slice("w", 0, Role.CONFLICT, np.arange(3)),), {"w": (10, 10)},
                {"model": {"parameters": 1000, "fingerprint": "ab" * 32}})
    nodes = np.flatnonzero(role != Role.FREE).astype(np.int32)
    score = generator.lognormal(size=len(nodes)).astype(np.float32)
    circuits = {name: Circuit(name, graph, nodes, np.full(len(nodes), graph.logits, np.int32),
                              np.full(len(nodes), Gate.ADDER, np.uint8), np.full(len(nodes), Provenance.BOTH, np.uint8),
                              -score, score / 2) for name in ("forget", "retain")}
    return {"plan": plan, "assignment": assignment, "circuits": circuits}


class Page(HTMLParser):
    """Every tag, attribute and visible text of a page; fails on a tag that is closed out of turn."""

    VOID = {"meta", "link", "br"}

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    @property
    def visible(self):
        return re.sub(r"\s+", " ", " ".join(self.text))


SMALL = Graph(2, 2, 1, 8, True)


def write(tmp_path, **changes):
    arguments = {"title": "A run", "evaluations": EVALUATIONS, "log": log(), "provenance": {}, **run(SMALL), **changes}
    path = tmp_path / "report.html"
    write_report(path, **arguments)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]
    source = path.read_text(encoding="utf-8")
    return source, Page(source)


def test_the_headline_and_tables_say_the_numbers(tmp_path):
    _, page = write(tmp_path, provenance={"verification": "exact: nothing else moved", "versions": {"torch": "2.13"}})
    for text in ("Recall of what had to be forgotten fell from 100% to 2.5%",
                 "Recall of what had to stay fell from 97.3% to 93.3%", "retain unseen", "addition",
                 "Loss attack", "3.0%", "30 of 1,000", "exact: nothing else moved",
                 "torch", "2.13", "Proven minimum"):
        assert text in page.visible


def test_a_model_that_forgot_nothing_is_not_flattered(tmp_path):
    _, page = write(tmp_path, evaluations={"before": evaluation(0.9, 0.9), "after": evaluation(1.0, 0.95)})
    assert "forgotten rose from 90.0% to 100%" in page.visible
    _, page = write(tmp_path, evaluations={"before": evaluation(0.9, 0.9), "after": evaluation(0.9, 0.9)})
    assert "forgotten stayed at 90.0%" in page.visible


def test_text_from_users_is_escaped_everywhere(tmp_path):
    evaluations = {EVIL: evaluation(0.5, 0.5, skills=(EVIL,), said=EVIL), "after": evaluation(0.1, 0.5)}
    circuits = run(SMALL)["circuits"]
    source, page = write(tmp_path, title=EVIL, evaluations=evaluations, circuits={EVIL: circuits["forget"]},
                         provenance={EVIL: EVIL, "nested": {EVIL: [EVIL, {"deep": EVIL}]}, "verification": EVIL})
    assert "<script" not in source.lower()
    assert not any(tag == "script" or name.startswith("on") for tag, attrs in page.tags for name in attrs)
    assert EVIL in page.visible


def test_nothing_is_loaded_from_outside(tmp_path):
    source, page = write(tmp_path)
    loading = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href", "ping"}
    found = {(tag, name, value) for tag, attrs in page.tags for name, value in attrs.items() if name in loading}
    assert found == {("link", "href", "data:,")}
    style = source[source.index("<style>"):source.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in source.replace("http-equiv", "")
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'")


def test_plots_and_tables_are_named_for_those_who_cannot_see_them(tmp_path):
    _, page = write(tmp_path)
    plots = [attrs for tag, attrs in page.tags if tag == "svg" and attrs.get("class") in ("plot", "strip", "split")]
    assert len(plots) > 8 and all(attrs["role"] == "img" and attrs["aria-label"] for attrs in plots)
    tags = [tag for tag, _ in page.tags]
    assert tags.count("table") == tags.count("caption") and tags.count("h1") == 1
    assert all("scope" in attrs for tag, attrs in page.tags if tag == "th")


def test_works_for_three_nodes_without_log_circuits_or_holdout(tmp_path):
    only = EVALUATIONS["after"]
    bare = Evaluation({k: only.detail[k] for k in ("forget", "retain")})
    plan = Plan(("embed", "m0", "logits"), np.array([0, 3, 0], np.uint8), (Slice("w", 0, Role.CONFLICT, np.arange(3)),),
                {"w": (10, 10)})
    assignment = Assignment(plan.role, np.ones(3, np.int8), np.zeros(3, np.int8), plan.role == 3, 1, 1, True, 1, 0, {})
    _, page = write(tmp_path, evaluations={"after": bare}, plan=plan, assignment=assignment, circuits=None, log=None)
    assert "2.5% of what had to be forgotten is still recalled" in page.visible
    assert "Privacy" not in page.visible and "Training" not in page.visible
    assert "m0" in page.visible and "Hardly any conflict was left to choose" in page.visible


def test_layers_without_a_role_are_not_drawn_and_one_node_serves(tmp_path):
    role = np.array([Role.FREE, Role.FORGET, Role.CONFLICT, Role.FREE, Role.FREE], np.uint8)
    plan = Plan(("embed", "a0.h0", "a0.h1", "m0.n0", "m0.n1"), role, (Slice("w", 0, Role.FORGET, np.arange(3)),), {"w": (9, 9)})
    _, page = write(tmp_path, plan=plan, assignment=None, circuits=None)
    assert "Attention nodes by layer" in page.visible and "MLP nodes by layer" not in page.visible
    assert "Of 5 nodes, 1 serves only what must go (forget) and 1 serves both sides" in page.visible


def test_a_hundred_thousand_nodes_stay_a_small_page_with_layer_counts_that_add_up(tmp_path):
    graph = Graph(32, 32, 8, 3000, True)
    large = run(graph)
    source, page = write(tmp_path, **large, log=log(20_000))
    assert graph.n_nodes > 98_000 and len(source) < 600_000
    rows = re.findall(r'<tr><th scope="row">(\d+)</th>((?:<td class="figure">[\d,]+</td>){8})</tr>', source)
    assert [int(layer) for layer, _ in rows] == list(range(32))
    counts = np.array([[int(c.replace(",", "")) for c in re.findall(r">([\d,]+)<", cells)] for _, cells in rows])
    total = counts[:, :4].sum(0) + counts[:, 4:].sum(0)
    expected = [np.count_nonzero((large["plan"].role == r) & (graph.layer >= 0) & (graph.layer < 32))
                for r in (Role.FORGET, Role.CONFLICT, Role.RETAIN, Role.FREE)]
    np.testing.assert_array_equal(total, expected)


def test_nodes_are_listed_by_forget_score(tmp_path):
    given = run(SMALL)
    source, _ = write(tmp_path, **given)
    listed = [unescape(name) for name in re.findall(r'<th scope="row"><code>([^<]+)</code>', source)]
    circuit, role = given["circuits"]["forget"], given["plan"].role
    score = dict(zip(circuit.src.tolist(), np.abs(circuit.ns), strict=True))
    responsible = [i for i in range(SMALL.n_nodes) if role[i] in (Role.FORGET, Role.CONFLICT)]
    assert listed == [SMALL.names[i] for i in sorted(responsible, key=lambda i: -score[i])[:20]]


def test_sets_whose_records_differ_between_models_are_pointed_out(tmp_path):
    other = Evaluation({**EVALUATIONS["after"].detail, "forget": result("forget", 0.1, n=41, name="forget")})
    _, page = write(tmp_path, evaluations={"before": EVALUATIONS["before"], "after": other})
    assert "not the same records in every column" in page.visible


def with_truths(found, shift, n=60):
    """The same evaluation with truth ratios, a utility of one set, and what else is only sometimes measured."""
    ratio = tuple(np.random.default_rng(1).normal(shift, 1, n).tolist())
    forget = replace(found.detail["forget"], truth_n=n, truth_ratio=0.4, choice_accuracy=0.25, choice_probability=0.3,
                     contained=0.125, matched=0.0625, perplexity=4.5)
    retain = replace(found.detail["retain"], truth_n=n, truth_ratio=0.5, probability=0.5, rouge_l=0.5)
    return replace(found, detail={**found.detail, "forget": forget, "retain": retain}, utility=("retain",),
                   records={"forget": {"log_truth_ratio": ratio}}, harness={"wmdp_bio": 0.26})


def test_published_scores_and_directions(tmp_path):
    found = {name: with_truths(e, shift) for (name, e), shift in zip(EVALUATIONS.items(), (-3, 0, 0), strict=True)}
    source, page = write(tmp_path, evaluations=found)
    quality = re.search(r"Forget quality.*?</tr>", source, re.DOTALL)[0]
    before, after, gold = re.findall(r'<td class="figure">(.*?)</td>', quality)
    assert float(before) < 1e-6 and after == "1" and "n/a" in gold
    assert "Model utility" in page.visible and "50.0%" in page.visible and "wmdp_bio" in page.visible
    assert "higher is better" in re.search(r"Truth ratio.{200}", source, re.DOTALL)[0]  # on the forget set too
    rows = re.findall(r'<th scope="row">(Loss|Probability|Multiple choice) <span class="n" role="img" aria-label="(\w+)',
                      source)
    assert rows[:3] == [("Probability", "lower"), ("Loss", "higher"), ("Multiple choice", "lower")]  # the forget set
    assert ("Probability", "higher") in rows[3:] and ("Loss", "lower") in rows[3:]
    lines = {line[:30].strip(): line.split()[-3:] for line in table(found).splitlines() if line.startswith("  ")}
    assert lines["forget, multiple choice"] == ["25.0%"] * 3 and "forget, multiple choice" in page.visible
    assert lines["forget quality (p value)"][1:] == ["1", "n/a"] and lines["model utility"] == ["50.0%"] * 3
    without = {name: e for name, e in found.items() if name != "gold"}
    _, page = write(tmp_path, evaluations=without)
    assert "not available without gold" in page.visible
    _, page = write(tmp_path)
    assert "Published scores" not in page.visible
    other = replace(found["gold"], settings={"evaluate": {"truth_mean": "arithmetic"}})
    _, page = write(tmp_path, evaluations={**found, "gold": other})  # cannot be compared: said, not computed
    assert "n/a" in re.search(r"Forget quality .*", table({**found, "gold": other}), re.IGNORECASE)[0]


def test_robustness_is_drawn_and_tabled_under_the_models_it_was_tried_on(tmp_path):
    def tried(value):
        lines = {"forget, not shown": (Recall(0.0, value), Recall(0.5, 0.75)), "retain": (Recall(1.0, 0.9), Recall(1.0, 0.8))}
        return Robustness({"relearning": Curve("steps of fine-tuning", (0.0, 50.0), lines)},
                          {"as trained": Recall(0.0, value), EVIL: Recall(0.25, 0.5)})

    source, page = write(tmp_path, robustness={"before": tried(0.9), "after": tried(0.125)})
    assert "does it come back?" in page.visible and "After: forget, not shown" in page.visible
    assert "0% / 0.12 50.0% / 0.75" in page.visible and "25.0% / 0.50" in page.visible and EVIL in page.visible
    assert "<script" not in source.lower()
    text = robustness_table({"before": tried(0.9), "after": tried(0.125)})
    assert text.splitlines()[2].split() == ["before", "relearning", "90.0%", "12.5%"]
    assert text.splitlines()[3].split() == ["after", "relearning", "75.0%", "75.0%"]
    _, page = write(tmp_path)
    assert "does it come back?" not in page.visible


def test_a_failed_write_leaves_the_old_report(tmp_path):
    write(tmp_path)
    old = (tmp_path / "report.html").read_text(encoding="utf-8")
    with pytest.raises(ClueError, match="at least one evaluation"):
        write(tmp_path, evaluations={})
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == old


def test_the_terminal_table_is_aligned_ascii_within_eighty_columns():
    text = table(EVALUATIONS)
    lines = text.splitlines()
    assert text.isascii() and max(map(len, lines)) <= 80
    assert lines[0].split() == ["before", "after", "gold"]
    row = {line.split("  ")[1].strip(): line for line in lines if line.startswith("  ")}
    assert row["forget"].split() == ["forget", "100%", "2.5%", "10.0%"]
    assert row["loss"].split() == ["loss", *(f"{e.mia_auc:.3f}" for e in EVALUATIONS.values())]
    ends = {re.sub(r"\s+$", "", line).rfind(line.split()[-1]) + len(line.split()[-1]) for line in lines
            if line.startswith("  ")}
    assert ends == {60}  # right-aligned: every row ends in the same column


def test_the_terminal_table_says_which_set_the_headline_is_as_the_page_does(tmp_path):
    found = EVALUATIONS["after"]
    detail = {**found.detail, "retain": replace(found.detail["retain"], name="unseen")}
    text = table({"after": replace(found, detail=detail)})
    assert "\n  retain: unseen  " in text and "\n  retain_unseen  " in text and "\n  forget  " in text
    _, page = write(tmp_path, evaluations={"after": replace(found, detail=detail)})
    assert "retain: unseen" in page.visible


def test_answers_that_rouge_has_no_word_of_are_not_left_out_silently():
    known = EVALUATIONS["before"]

    def unknown(contained):
        forget = replace(known.detail["forget"], rouge_l=None, rouge_n=0, contained=contained)
        return replace(known, detail={**known.detail, "forget": forget})

    both = table({"before": unknown(0.5), "after": known})
    assert re.search(r"ROUGE-L recall +n/a +\d.*\n +\(n/a: ROUGE knows words of a-z", both)
    assert "n/a" not in table({"before": known})
    assert "ROUGE" not in table({"before": unknown(None)})  # nothing was generated


def test_many_models_and_long_names_continue_below():
    many = {f"a model with a long name {i}": EVALUATIONS["after"] for i in range(7)}
    lines = table(many).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines.count("") == 1 and sum("skills" in line for line in lines) == 2
