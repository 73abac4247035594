"""The whole main job, in memory: records become pairs, pairs become scores, scores become circuits, circuits become a
formula, the formula becomes a plan, and the plan steers fine-tuning.

Read :func:`locate` from top to bottom to understand how CLUE finds what to change. :mod:`clue.jobs` runs the same stages
in a run directory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from .config import DataSettings, LocalizeSettings, check, check_seed
from .data.pairs import CORRUPTIONS, corrupt
from .data.records import read_sets
from .errors import ClueError
from .plan import Plan
from .provenance import fingerprint, versions
from .types import Role

if TYPE_CHECKING:
    from torch import nn

    from .circuit.attribution import Scores
    from .circuit.graph import Circuit, Graph
    from .data.pairs import Pairs
    from .editability import Editability
    from .logic import Assignment
    from .model.anatomy import Anatomy

#: Anything :func:`clue.read` understands: a file, a dataset id, a list of records, or a record set itself.
Source = Any
Progress = Callable[[str], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Localization:
    """Every intermediate of :func:`locate`; dictionaries are keyed by the name of the record set, ``forget`` first."""

    pairs: Mapping[str, Pairs]
    scores: Mapping[str, Scores]
    circuits: Mapping[str, Circuit]
    assignment: Assignment
    plan: Plan


def compute(stage: str, make: Callable[[], T]) -> T:
    """The default of ``keep`` in :func:`locate`: every stage is computed and none is stored."""
    return make()


def localize(model: nn.Module, tokenizer: Any, forget: Source, retain: Source | Mapping[str, Source],
             settings: LocalizeSettings = LocalizeSettings(), *, data: DataSettings = DataSettings(), seed: int = 0,
             progress: Progress | None = None, keep: Callable[[str, Callable[[], Any]], Any] = compute) -> Plan:
    """Find the nodes responsible for a forget set, and prove which of them can change.

    ``settings.method`` may name another localization to compare with (:mod:`clue.baselines`).

    Args:
        model: a causal language model of a family in :data:`clue.model.families.FAMILIES`; left as it was.
        tokenizer: its tokenizer.
        forget: records to forget: a file, a dataset id, a list of records, or a :class:`clue.RecordSet`.
        retain: records to keep, one source or several by name; general skills are retain sets too.
        settings, data: see :mod:`clue.config`.
        seed: seeds the choice of corrupted prompts; everything after it is deterministic.
        progress: called with one line of text per finished stage.
        keep: as for :func:`clue.pipeline.locate`.

    Returns:
        The :class:`clue.Plan`: a role for every node, and the slices of the weights that may change.

    Raises:
        ClueError: a subclass that names the record, file, argument or parameter at fault.
    """
    check(settings, LocalizeSettings)
    check(data, DataSettings)
    seed = check_seed(seed)
    if settings.method == "clue":
        return locate(model, tokenizer, forget, retain, settings, data=data, seed=seed, progress=progress, keep=keep).plan
    from . import baselines

    plan: Plan = keep("plan", lambda: baselines.localize(
        settings.method, model, tokenizer, forget, retain, ratio=settings.ratio, batch_size=settings.batch_size, data=data,
        seed=seed))
    if progress is not None:
        progress(f"plan       {settings.method}: {plan.weights_changed} weights may change")
    return plan


def locate(model: nn.Module, tokenizer: Any, forget: Source, retain: Source | Mapping[str, Source],
           settings: LocalizeSettings = LocalizeSettings(), *, data: DataSettings = DataSettings(), seed: int = 0,
           progress: Progress | None = None, keep: Callable[[str, Callable[[], Any]], Any] = compute) -> Localization:
    """:func:`localize`, returning every intermediate.

    ``keep(stage, make)`` returns the stage's value, from a store when it has one, else from ``make()``.
    """
    from .circuit.attribution import attribute
    from .model.anatomy import anatomy, check_weights
    from .size import sized

    say = progress or (lambda line: None)
    check(settings, LocalizeSettings)
    if settings.mode == "surgical" and settings.semantics == "authors":
        raise ClueError("mode = surgical reads the gates in a way of its own: leave semantics = support")
    check(data, DataSettings)
    seed = check_seed(seed)
    body = anatomy(model)
    check_weights(model)
    sets = read_sets(forget, retain)

    pairs: dict[str, Pairs] = keep("pairs", lambda: corrupt(sets, tokenizer, body, settings, data, seed))
    say("pairs      " + ", ".join(f"{name} {_counts(p)}" for name, p in pairs.items()))

    scores: dict[str, Scores] = keep("scores", lambda: {
        name: attribute(body, p, settings, name=name) for name, p in pairs.items()})
    say(f"scores     conservation gap at most {max(max(s.gap_ns, s.gap_dn) for s in scores.values()):.1e}")

    given, settings = settings, sized(body, scores["forget"], settings)
    if settings != given:
        say(f"size       {settings.ratio:.0%} of the weights" + ("" if given.edges or given.faithfulness else
            f": {settings.edges:.2%} of the edges") + ("" if given.neurons or given.granularity == "block" else
            f", {settings.neurons:.2%} of the neurons"))
    circuits: dict[str, Circuit] = keep("circuits", lambda: {
        name: cut(body, pairs[name], s, settings) for name, s in scores.items()})
    say("circuits   " + ", ".join(f"{name} {circuit.summary()}" for name, circuit in circuits.items()))

    measured: Editability | None = None
    if settings.weighting == "editability":
        measured = keep("editability", lambda: _editability(body, tokenizer, sets, circuits["forget"], settings, data, seed))

    assignment: Assignment = keep("assignment", lambda: solve(scores, circuits, settings, editability=measured, seed=seed))
    say(f"roles      conflict cost {assignment.cost}, {'proven least' if assignment.optimal else 'NOT proven least'}:"
        f" {assignment.n_forced} forced, {assignment.n_chosen} chosen")

    plan: Plan = keep("plan", lambda: make_plan(body, circuits["forget"].graph, assignment, {
        "model": {"family": body.family, "fingerprint": fingerprint(model),
                  "parameters": sum(p.numel() for p in model.parameters())},
        "data": {name: {"records": len(records), "sha256": records.sha256, "pairs_sha256": pairs[name].sha256}
                 for name, records in sets.items()},
        "settings": {"data": asdict(data), "localize": asdict(settings)},
        "seed": seed,
        "versions": versions(),
    }))
    counts = ", ".join(f"{count} {role}" for role, count in plan.counts().items())
    say(f"plan       {counts}; {plan.weights_changed} weights may change")
    return Localization(pairs, scores, circuits, assignment, plan)


def cut(body: Anatomy, pairs: Pairs, scores: Scores, settings: LocalizeSettings) -> Circuit:
    """The circuit of one set; the model runs again only for a faithfulness target and to confirm gates."""
    from .circuit.confirmation import confirm
    from .circuit.faithfulness import judge
    from .circuit.selection import build_circuit

    circuit = build_circuit(scores, settings, faithful=judge(body, pairs, settings))
    return confirm(body, pairs, circuit, settings) if settings.confirm else circuit


def _counts(pairs: Pairs) -> str:
    """How many pairs there are, and how many were corrupted in which way."""
    kinds = Counter(pairs.kind)
    ways = [(kinds[kind], "as given" if kind == "given" else f"by {kind}") for kind in CORRUPTIONS if kind in kinds]
    return f"{len(pairs)} " + " and ".join(way if len(ways) == 1 else f"{count} {way}" for count, way in ways)


def _editability(body: Anatomy, tokenizer: Any, sets: Mapping[str, Any], circuit: Circuit, settings: LocalizeSettings,
                 data: DataSettings, seed: int) -> Editability:
    """Of the nodes of the forget circuit: no others can be chosen."""
    from .editability import editability

    retain = {name: found for name, found in sets.items() if name != "forget"}
    return editability(body, tokenizer, sets["forget"], retain, circuit.graph, circuit.nodes, data=data,
                       batch_size=settings.batch_size, seed=seed)


def solve(scores: Mapping[str, Scores], circuits: Mapping[str, Circuit], settings: LocalizeSettings, *,
          editability: Editability | None = None, seed: int = 0) -> Assignment:
    """Turn the circuits into a formula and solve it to the proven minimum of conflicts, or of edits in surgical mode.

    ``editability`` is needed, and used, where ``settings.weighting`` asks for it.

    With ``settings.stability``, only roles that are stable under the scores' uncertainty lead to edits (see
    :mod:`clue.stability`); ``seed`` seeds its samples.
    """
    from .logic import assign, operate

    def once(scores: Mapping[str, Scores], circuits: Mapping[str, Circuit]) -> Assignment:
        forget = [circuits["forget"]]
        retain = [circuit for name, circuit in circuits.items() if name != "forget"]
        values = objectives(scores, circuits["forget"].graph, settings, editability)
        if settings.mode == "surgical":
            return operate(forget, retain, **values)
        return assign(forget, retain, semantics=settings.semantics, **values)

    found = once(scores, circuits)
    if not settings.stability:
        return found
    from .stability import keep_stable, sample_roles

    return keep_stable(found, sample_roles(scores, circuits, settings, once, seed=seed), settings.stability)


def objectives(scores: Mapping[str, Scores], graph: Graph, settings: LocalizeSettings,
               editability: Editability | None = None) -> dict[str, Any]:
    """``weights``, ``retain_score`` and ``forget_score`` of :func:`clue.logic.assign`.

    What a retain node is worth is its largest score over the retain sets, each scaled to a largest score of one, so that
    no set outweighs another by the size of its logits.
    """
    retain_score = np.max([scaled(found, graph) for name, found in scores.items() if name != "forget"], axis=0)
    weights = None
    if settings.weighting == "attribution":
        weights = 1 + np.round(999 * retain_score).astype(np.int64)
    elif settings.weighting == "editability":
        if editability is None:
            raise ClueError("weighting = editability needs every node's editability: measure it with"
                            " clue.editability.editability")
        weights = editability.costs()
    return {"weights": weights, "retain_score": retain_score, "forget_score": scaled(scores["forget"], graph)}


def scaled(scores: Scores, graph: Graph) -> np.ndarray[Any, np.dtype[np.float64]]:
    """float64 [nodes] in [0, 1]: node scores relative to the largest editable node's."""
    found = np.where(graph.editable, scores.node_scores(graph), 0.0)
    scaled: np.ndarray[Any, np.dtype[np.float64]] = found / max(float(found.max()), 1e-30)
    return scaled


def make_plan(body: Anatomy, graph: Graph, assignment: Assignment, provenance: Mapping[str, Any]) -> Plan:
    """Map forget and conflict nodes to the slices of the weights they own.

    A key/value group serves several query heads and is one node, so its rows are planned once, with one role.
    """
    role = np.where(graph.editable, assignment.role, Role.FREE).astype(np.uint8)
    return Plan.of_roles(body, graph, role, provenance)
