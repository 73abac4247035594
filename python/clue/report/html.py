"""The single-file HTML report: what a run did, for people who did not run it.

:func:`write_report` turns evaluations, plan, assignment and training log into plain values, ``report.html.j2`` lays
them out, ``report.css`` dresses them, :mod:`clue.report.svg` draws them. The file needs nothing from outside itself and
runs no script; every text that came from a user is escaped by the template.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..data.atomic import write_atomically
from ..errors import ClueError
from ..evaluate.evaluation import Evaluation, privleak
from ..evaluate.truth import forget_quality, incomparable, model_utility
from ..types import Role
from .measures import ATTACKS, MEASURES, caption, pooled, titled
from .svg import Series, dumbbell, line_plot, number, percent, split_bar, stacked_columns, strip_scale

if TYPE_CHECKING:
    from ..circuit.graph import Circuit
    from ..evaluate.robustness import Robustness
    from ..logic import Assignment
    from ..plan import Plan
    from ..unlearn.log import UnlearnLog

#: Nodes listed by name; the plan itself holds all of them.
TOP_NODES = 20
#: Answers shown of each set.
SAMPLES = 4
#: Below this share of conflicts left to choose, the circuits are too dense for the solver to matter: the report warns.
FEW_CHOICES = 0.05

_ROLES = ("forget", "conflict", "retain", "free")
_STYLES = {"before": "before", "after": "after", "gold": "gold"}
_OTHER_STYLES = ("other-1", "other-2", "other-3")
_STAGES = {0: "joint", 1: "forget weights", 2: "conflict weights", 3: "in turn"}


@dataclass(frozen=True)
class Column:
    """One evaluated model: the key it was given under, how it is written, and its CSS class."""

    key: str
    name: str
    style: str
    evaluation: Evaluation


def write_report(path: str | os.PathLike[str], *, title: str, evaluations: Mapping[str, Evaluation], plan: Plan,
                 assignment: Assignment | None = None, circuits: Mapping[str, Circuit] | Iterable[Circuit] | None = None,
                 log: UnlearnLog | None = None, robustness: Mapping[str, Robustness] | None = None,
                 provenance: Mapping[str, Any] | None = None) -> None:
    """Write the report as one HTML file, whole or not at all.

    Args:
        title: shown on top and as the title of the page.
        evaluations: results by model, in the order of the columns; ``before``, ``after`` and ``gold`` (retrained
            without the forget set) have a meaning, other names are shown as they are. At least one.
        plan: roles of the nodes, and the weights that could move. The share of weights is shown when
            ``plan.provenance["model"]["parameters"]`` gives the size of the model.
        assignment: of the same nodes; which conflicts were forced. None where no formula was solved (a baseline).
        circuits: give the nodes' scores in the list of nodes; the forget circuit is the one named ``forget``.
        log: training curves.
        robustness: what was tried to bring the forgotten back, by model, under the keys of ``evaluations``.
        provenance: anything nested of plain values (settings, versions, hardware, files). The text under
            ``verification``, if any, is shown beside the roles.

    Raises:
        ClueError: there is no evaluation.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    if not evaluations:
        raise ClueError("a report needs at least one evaluation: run `clue evaluate` first")
    resources = files(__package__)
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"percent": percent, "number": number}
    template = environment.from_string((resources / "report.html.j2").read_text(encoding="utf-8"))
    provenance = dict(provenance or {})
    columns = _columns(evaluations)
    text = template.render(
        style=Markup((resources / "report.css").read_text(encoding="utf-8")),
        title=title,
        headline=_headline(evaluations),
        columns=columns,
        tiles=_tiles(evaluations, plan),
        summary=list(_summary(columns)),
        scores=list(_scores(columns, evaluations.get("gold"))),
        scale=strip_scale(),
        samples=_samples(columns),
        roles=_roles(plan),
        verification=provenance.pop("verification", None),
        conflicts=None if assignment is None else _conflicts(assignment),
        nodes=_nodes(plan, assignment, circuits),
        n_responsible=int(np.isin(plan.role, (Role.FORGET, Role.CONFLICT)).sum()),
        curves=_curves(log) if log is not None and log.steps else [],
        privacy=_privacy(columns, evaluations.get("gold")),
        robustness=_robustness(columns, robustness or {}),
        details=list(_details(columns)),
        measures=[*MEASURES.values()],
        attacks=[*ATTACKS.values()],
        sets=_sets(columns),
        provenance=groups_of({**provenance, "plan": dict(plan.provenance),
                            "evaluation": columns[-1].evaluation.settings}),
    )
    write_atomically(path, text.encode("utf-8", "replace"))


def _columns(evaluations: Mapping[str, Evaluation]) -> list[Column]:
    others = [key for key in evaluations if key not in _STYLES]
    return [Column(key, caption(key), _STYLES.get(key) or _OTHER_STYLES[others.index(key) % len(_OTHER_STYLES)], found)
            for key, found in evaluations.items()]


def _ends(evaluations: Mapping[str, Evaluation]) -> tuple[Evaluation | None, Evaluation]:
    """The model before, and the one the report is about."""
    after = evaluations.get("after") or [found for key, found in evaluations.items() if key != "gold"
                                         or len(evaluations) == 1][-1]
    before = evaluations.get("before")
    return (None if before is after else before), after


def _headline(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """What happened, in one or two sentences of numbers; no adjective that a number could contradict."""
    before, after = _ends(evaluations)
    kept = pooled(after, "retain")
    if before is None:
        return [f"{percent(after.forget)} of what had to be forgotten is still recalled,",
                f"and {percent(kept)} of what had to stay."]
    was = pooled(before, "retain")
    return [f"Recall of what had to be forgotten {_went(before.forget, after.forget)}.",
            f"Recall of what had to stay {_went(was, kept)}."]


def _went(before: float, after: float) -> str:
    if percent(before) == percent(after):
        return f"stayed at {percent(after)}"
    return f"{'fell' if after < before else 'rose'} from {percent(before)} to {percent(after)}"


def _tiles(evaluations: Mapping[str, Evaluation], plan: Plan) -> list[dict[str, Any]]:
    """The key figures: a caption, the figure now, and what to compare it with."""
    before, after = _ends(evaluations)
    gold = evaluations.get("gold")

    def tile(name: str, hint: str, read: Any, show: Any = percent) -> dict[str, Any]:
        notes = [f"{label} {show(value)}" for label, found in (("before", before), ("gold", gold))
                 if found is not None and found is not after and (value := read(found)) is not None]
        return {"name": name, "hint": hint, "value": show(read(after)), "notes": notes}

    purposes = [result.purpose for result in after.detail.values()]
    tiles = [tile("Forget set", "recalled; lower is better", lambda e: e.forget),
             tile("Retain set", "recalled; higher is better", lambda e: e.retain)]
    if purposes.count("retain") > 1:
        tiles.append(tile("Other retain sets", "recalled, over all their records",
                          lambda e: pooled(e, "retain", without="retain")))
    if "skill" in purposes:
        tiles.append(tile("General skills", "solved, mean over skills", lambda e: float(np.mean([*e.skills.values()]))))
    if after.mia_auc is not None:
        tiles.append(tile("Privacy attack", "AUC of the loss attack; 0.5 is ideal", lambda e: e.mia_auc,
                          lambda v: f"{v:.2f}"))
    total = (plan.provenance.get("model") or {}).get("parameters")
    share = percent(plan.weights_changed / total) if total else f"{plan.weights_changed:,}"
    note = f"{plan.weights_changed:,} of {total:,}" if total else f"in {len(plan.parameters())} matrices"
    tiles.append({"name": "Planned weights", "hint": "may move; no other weight does", "value": share, "notes": [note]})
    return tiles


def _summary(columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    """Groups of rows: a caption, and per set its accuracy under every model with the strip that shows them."""
    titles = {"forget": "To be forgotten: lower is better", "retain": "To be kept: higher is better",
              "skill": "General skills: higher is better", "member": "To be forgotten, attacked as trained on",
              "holdout": "Never trained on: for comparison"}
    for purpose, title in titles.items():
        rows = []
        for name in _set_names(columns, purpose):
            found = [(c, c.evaluation.detail.get(name)) for c in columns]
            label = _label(name, columns)
            shown = {label: [None if r is None else r.solved for _, r in found]}
            choices = [None if r is None else r.choice_accuracy for _, r in found]
            if purpose == "forget" and any(value is not None for value in choices):
                shown[f"{label}, multiple choice"] = choices
            n = max(r.n for _, r in found if r is not None)
            for label, values in shown.items():
                strip = dumbbell([(c.name, c.style, v) for (c, _), v in zip(found, values, strict=True) if v is not None],
                                 style=purpose)
                rows.append({"name": label, "n": n, "strip": strip, "values": values})
        if rows:
            yield {"title": title, "purpose": purpose, "rows": rows}


def _scores(columns: Sequence[Column], gold: Evaluation | None) -> Iterator[dict[str, Any]]:
    """The scores that are made of several measures: name, direction, what it is, and its text under every model."""
    asked = any(c.evaluation.detail["forget"].truth_n for c in columns)
    qualities = [None if gold is None or c.evaluation is gold or incomparable(c.evaluation, gold) else
                 forget_quality(c.evaluation, gold) for c in columns]
    if asked:
        yield {"name": "Forget quality", "better": "higher", "values": [None if v is None else number(v) for v in qualities],
               "meaning": "p value of the Kolmogorov-Smirnov test between the truth ratios of this model and of gold: above"
                          " 0.05 the two cannot be told apart" + ("" if gold is not None else "; not available without gold")}
    utilities = [model_utility(c.evaluation) for c in columns]
    if any(v is not None for v in utilities):
        yield {"name": "Model utility", "better": "higher", "values": [None if v is None else percent(v) for v in utilities],
               "meaning": "harmonic mean of probability, ROUGE-L recall and truth ratio over "
                          + ", ".join(columns[-1].evaluation.utility).replace("_", " ")}
    for task in dict.fromkeys(task for c in columns for task in c.evaluation.harness):
        values = [c.evaluation.harness.get(task) for c in columns]
        yield {"name": task, "better": "", "meaning": "accuracy under lm-evaluation-harness",
               "values": [None if v is None else percent(v) for v in values]}


def _robustness(columns: Sequence[Column], found: Mapping[str, Robustness]) -> dict[str, Any]:
    """Per curve a plot of the set it is about under every model, and all its numbers; recall per way of asking."""
    tried = [(c, found[c.key]) for c in columns if c.key in found]
    curves = []
    for name in dict.fromkeys(name for _, one in tried for name in one.curves):
        with_it = [(c, one.curves[name]) for c, one in tried if name in one.curves]
        first = next(iter(with_it[0][1].lines))
        series = [Series(c.name, c.style, np.array(curve.x), np.array([r.probability for r in curve.lines[first]]))
                  for c, curve in with_it]
        plot = line_plot(series, label=f"{caption(name)}: probability of answers of {first}; the table has the numbers",
                         x_label=with_it[0][1].x_label, y_label=f"probability, {first}")
        rows = [{"name": f"{c.name}: {line}", "cells": [f"{percent(r.accuracy)} / {r.probability:.2f}" for r in recall]}
                for c, curve in with_it for line, recall in curve.lines.items()]
        curves.append({"name": caption(name), "plot": plot, "series": series, "rows": rows,
                       "x_label": with_it[0][1].x_label, "x": [number(x) for x in with_it[0][1].x]})
    ways = dict.fromkeys(way for _, one in tried for way in one.prompts)
    prompts = [{"name": way, "cells": [None if (r := one.prompts.get(way)) is None else
                                       f"{percent(r.accuracy)} / {r.probability:.2f}" for _, one in tried]} for way in ways]
    return {"curves": curves, "prompts": prompts, "names": [c.name for c, _ in tried]}


def _set_names(columns: Sequence[Column], purpose: str | None = None) -> list[str]:
    return list(dict.fromkeys(name for c in columns for name, result in c.evaluation.detail.items()
                              if purpose in (None, result.purpose)))


def _label(name: str, columns: Sequence[Column]) -> str:
    """A set as people write it, with its own name where that is another one."""
    return titled(name, [c.evaluation for c in columns]).replace("_", " ")


def _samples(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Per set the first prompts, the true answer, and what each model says; None where a model was not asked."""
    groups = []
    for name in dict.fromkeys(name for c in columns for name in c.evaluation.samples):
        said = [{(s.prompt, s.answer): s.generated for s in c.evaluation.samples.get(name, ())} for c in columns]
        asked = list(dict.fromkeys(key for found in said for key in found))[:SAMPLES]
        rows = [{"prompt": prompt, "answer": answer, "said": [
                    None if (text := found.get((prompt, answer))) is None else
                    {"text": text, "right": text.split() == answer.split()} for found in said]}
                for prompt, answer in asked]
        groups.append({"name": _label(name, columns), "rows": rows})
    return groups


def _roles(plan: Plan) -> dict[str, Any]:
    """Counts per role, and by layer for attention and MLP nodes apart (a model has far more neurons than heads)."""
    place = re.compile(r"([am])(\d+)")
    found = [place.match(name) for name in plan.nodes]
    inside = np.array([m is not None for m in found], dtype=bool)
    layer = np.array([int(m[2]) for m in found if m], dtype=np.int64)
    mlp = np.array([m[1] == "m" for m in found if m], dtype=bool)
    role = plan.role[inside].astype(np.int64)
    n_layers = int(layer.max(initial=-1)) + 1
    panels, table = [], [{"layer": i} for i in range(n_layers)]
    for name, chosen in (("Attention", ~mlp), ("MLP", mlp)):
        counts = np.zeros((n_layers, len(Role)), dtype=np.int64)
        np.add.at(counts, (layer[chosen], role[chosen]), 1)
        by_role = {r: counts[:, Role[r.upper()]].tolist() for r in _ROLES}
        for i, row in enumerate(table):
            row[name] = [by_role[r][i] for r in _ROLES]  # type: ignore[assignment]
        used = {r: by_role[r] for r in _ROLES if r != "free"}
        if any(map(any, used.values())):
            panels.append({"name": name, "plot": stacked_columns(
                [str(i) for i in range(n_layers)], used, x_label="layer", y_label="nodes",
                label=f"{name} nodes of each role by layer; the table below has the numbers")})
    counts_by_role = plan.counts()
    baseline = plan.provenance.get("baseline") or {}
    return {"weights": plan.weights_changed, "parameters": len(plan.parameters()), "baseline": baseline.get("name"),
            "counts": counts_by_role, "total": len(plan.nodes), "panels": panels, "table": table, "names": _ROLES,
            "split": split_bar([(r, r, counts_by_role[r]) for r in _ROLES])}


def _conflicts(assignment: Assignment) -> dict[str, Any]:
    forced, chosen = int(assignment.n_forced), int(assignment.n_chosen)
    total = forced + chosen
    return {"forced": forced, "chosen": chosen, "total": total, "cost": int(assignment.cost),
            "bound": int(assignment.lower_bound), "optimal": bool(assignment.optimal),
            "few": total > 0 and chosen < FEW_CHOICES * total,
            "split": split_bar([("forced", "forced", forced), ("chosen", "chosen", chosen)])}


def _nodes(plan: Plan, assignment: Assignment | None,
           circuits: Mapping[str, Circuit] | Iterable[Circuit] | None) -> dict[str, Any]:
    """The forget and conflict nodes with the largest forget scores; without circuits in the order of the graph."""
    listed = list(circuits.values() if isinstance(circuits, Mapping) else circuits or ())
    forget = _strength([c for c in listed if c.name == "forget"], len(plan.nodes))
    retain = _strength([c for c in listed if c.name != "forget"], len(plan.nodes))
    responsible = np.flatnonzero(np.isin(plan.role, (Role.FORGET, Role.CONFLICT)))
    order = responsible[np.argsort(-forget[responsible], kind="stable")][:TOP_NODES]
    rows = [{"name": plan.nodes[i], "role": Role(plan.role[i]).name.lower(),
             "why": ("forced" if assignment.forced[i] else "chosen")
             if assignment is not None and plan.role[i] == Role.CONFLICT else "",
             "forget": float(forget[i]), "retain": float(retain[i])} for i in order]
    return {"rows": rows, "scored": bool(listed)}


def _strength(circuits: Sequence[Circuit], n_nodes: int) -> npt.NDArray[np.float64]:
    """float64 [nodes]: a node's largest absolute score, over its edges and both directions, as a share of the largest
    of its circuit; the largest over circuits. Structural edges have no score."""
    strongest = np.zeros(n_nodes)
    for circuit in circuits:
        score = np.nan_to_num(np.fmax(np.abs(circuit.ns), np.abs(circuit.dn)).astype(np.float64))
        found = np.zeros(n_nodes)
        np.maximum.at(found, circuit.src, score)
        np.maximum.at(found, circuit.dst, score)
        strongest = np.maximum(strongest, found / (found.max(initial=0) or 1))
    return strongest


def _curves(log: UnlearnLog) -> list[dict[str, Any]]:
    stage = np.asarray(log.stage)
    step = np.arange(len(stage), dtype=np.float64)
    starts = [0, *(np.flatnonzero(np.diff(stage)) + 1).tolist()]
    marks = [(float(i), _STAGES.get(int(stage[i]), f"stage {stage[i]}")) for i in starts] if len(starts) > 1 else []

    def curve(name: str, y_label: str, *lines: tuple[str, str, str]) -> dict[str, Any]:
        found = [(label, style, np.asarray(getattr(log, field), dtype=np.float64)) for field, label, style in lines]
        series = [Series(label, style, step[np.isfinite(y)], y[np.isfinite(y)]) for label, style, y in found
                  if np.isfinite(y).any()]
        plot = line_plot(series, label=f"{name} by optimizer step", x_label="step", y_label=y_label, marks=marks)
        return {"name": name, "series": series, "plot": plot}

    curves = [curve("Loss", "nats per token", ("forget_loss", "forget objective", "forget"),
                    ("retain_loss", "retain", "retain")),
              curve("Forgetting", "of the forget batch", ("forget_probability", "mean answer probability", "forget"),
                    ("forgotten", "share forgotten", "after")),
              curve("Gradient norm", "2-norm before clipping", ("grad_norm", "planned weights", "after")),
              curve("Learning rate", "learning rate", ("lr", "learning rate", "after"))]
    return [c for c in curves if c["series"]]


def _privacy(columns: Sequence[Column], gold: Evaluation | None) -> list[dict[str, Any]]:
    """Per attack: the ROC curves of all models, and the figures."""
    attacks = []
    for name in dict.fromkeys(name for c in columns for name in c.evaluation.mia):
        found = [(c, c.evaluation.mia[name]) for c in columns if name in c.evaluation.mia]
        series = [Series(c.name, c.style, np.array(a.fpr), np.array(a.tpr)) for c, a in found]
        plot = line_plot(series, label=f"ROC curves of the {name} attack; the table below has the areas",
                         x_label="false positives", y_label="members recognised", shares=True, chance=True,
                         marks=((0.01, "1%"), (0.05, "5%")))
        title = ATTACKS[name].name if name in ATTACKS else caption(name)
        attacks.append({"name": title, "plot": plot, "series": series, "rows": [
            {"name": c.name, "auc": a.auc, "low": a.low, "high": a.high, "one": a.tpr_at_1, "five": a.tpr_at_5,
             "leak": _signed(None if gold is None else privleak(c.evaluation, gold, name)),
             "members": a.members, "others": a.non_members} for c, a in found]})
    return attacks


def _signed(value: float | None) -> str | None:
    return None if value is None else "0%" if round(value) == 0 else f"{value:+.0f}%"


def _details(columns: Sequence[Column]) -> Iterator[dict[str, Any]]:
    for name in _set_names(columns):
        found = [c.evaluation.detail.get(name) for c in columns]
        rows = []
        for field, measure in MEASURES.items():
            values = [None if r is None else getattr(r, field) for r in found]
            if any(v is not None for v in values):
                purpose = next(r.purpose for r in found if r is not None)
                rows.append({"name": measure.name, "better": measure.better(purpose),
                             "values": [None if v is None else measure.show(v) for v in values]})
        yield {"name": _label(name, columns), "rows": rows}


def _sets(columns: Sequence[Column]) -> list[dict[str, Any]]:
    """Every record set with its size and hash; more than one hash means the columns cannot be compared on it."""
    rows = []
    for name in _set_names(columns):
        found = [c.evaluation.detail[name] for c in columns if name in c.evaluation.detail]
        hashes = list(dict.fromkeys(r.sha256 for r in found))
        rows.append({"name": _label(name, columns), "n": found[0].n, "hashes": hashes})
    return rows


def groups_of(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Nested plain values as groups of (dotted key, text); values outside any group come first."""
    single = {key: value for key, value in values.items() if not isinstance(value, Mapping)}
    groups = [{"name": "run", "rows": list(_flat(single))}] if single else []
    groups += [{"name": key, "rows": list(_flat(value))} for key, value in values.items()
               if isinstance(value, Mapping) and value]
    return groups


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)):
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif isinstance(value, bool) or value is None:
            yield f"{prefix}{key}", {True: "yes", False: "no", None: "none"}[value]
        else:
            yield f"{prefix}{key}", str(value)
