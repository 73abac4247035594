"""What a run is measured on: its own sets, tests that are given, and benchmarks, with the overlaps between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from .errors import OverlapError

if TYPE_CHECKING:
    from .data.records import RecordSet
    from .evaluate import EvaluationSets


@dataclass(frozen=True)
class Tests:
    """What a run is evaluated on besides its own forget set: sources as the command line takes them. Of its retain sets the
    first is read only where there is none here.

    ``gold`` is a model, or the file of its evaluation; ``reference`` a model for the attack of that name; ``benchmark`` as
    :func:`clue.data.benchmarks.load` takes it, with ``data`` where its files are.
    """

    paraphrase: str | None = None
    holdout: str | None = None
    retain: Mapping[str, str] = field(default_factory=dict)
    skills: Mapping[str, str] = field(default_factory=dict)
    gold: str | None = None
    reference: str | None = None
    benchmark: str | None = None
    data: str | None = None


def evaluation_sets(used: Mapping[str, RecordSet], tests: Tests, seed: int = 0) -> tuple[EvaluationSets, dict[str, int]]:
    """The sets to measure on, and how many records of each are also among those ``used`` to localize and retain, the forget set
    among them.

    The first retain test is the headline; without one the first retain set itself is read, and counted as overlap. What a
    benchmark measures by its own protocol may overlap with what was retained, which is counted; sets given as tests, and
    those that are there to be new to the model, may not.

    Raises:
        OverlapError: a test set that should be independent shares records with the forget or a retain set.
    """
    from .data import benchmarks
    from .data.records import overlap, read
    from .evaluate import EvaluationSets

    benchmark = benchmarks.load(tests.benchmark, tests.data, seed=seed) if tests.benchmark else benchmarks.Benchmark("")
    retain = {name: read(source, name) for name, source in tests.retain.items()}
    skills = {name: read(source, name) for name, source in tests.skills.items()}
    holdout = read(tests.holdout, "holdout") if tests.holdout else None
    paraphrase = read(tests.paraphrase, "forget_paraphrase") if tests.paraphrase else None
    independent = {**retain, **skills}
    for name, given in (("holdout", holdout), ("forget_paraphrase", paraphrase)):
        if given is not None:
            independent[name] = given
    for name, records in independent.items():
        for other in used.values():
            shared = overlap(records, other)
            if shared:
                raise OverlapError(f"the test set {name} shares {shared} of its {len(records)} records with the set"
                                   f" {other.name} used to localize and train: remove them from one of the two")
    overlaps: dict[str, int] = {}
    for name, records in benchmark.measured().items():
        forgets = name in ("forget", "forget_paraphrase", "members") or name in benchmark.forget_extra
        for other in used.values():
            shared = overlap(records, other)
            if shared and (forgets != (other.name == "forget") or name == "holdout"):
                raise OverlapError(f"{tests.benchmark}: its set {name} shares {shared} of its {len(records)} records with the"
                                   f" set {other.name} of this run: another part of the benchmark belongs to this run")
            if shared and not forgets:
                overlaps[name] = overlaps.get(name, 0) + shared
    retain = {**benchmark.retain, **retain}
    if not retain:
        name = next(name for name in used if name != "forget")
        retain, overlaps[name] = {name: used[name]}, len(used[name])
    headline = next(iter(retain))
    extra = {name: records for name, records in retain.items() if name != headline}
    sets = EvaluationSets.of(benchmark, forget=used["forget"], retain=retain[headline])
    return replace(sets, retain=retain[headline], retain_extra=extra, skills={**benchmark.skills, **skills},
                   forget_paraphrase=paraphrase or sets.forget_paraphrase, holdout=holdout or sets.holdout,
                   members=None if holdout else sets.members), overlaps
