"""The commands' work: the stages of :mod:`clue.pipeline` in a run directory, each resumed when it is there already.

A run directory holds ``pairs``, ``scores``, ``circuits``, ``editability`` (where it weighs), ``assignment``, ``plan``,
``model`` (the unlearned model and its training log), ``evaluation``, on request ``robustness``, and ``report.html``;
``run.json`` says what made them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import pipeline
from .config import EvaluateSettings, LocalizeSettings, Settings, UnlearnSettings
from .data.records import read_sets
from .errors import PlanError, RunError
from .evaluation_sets import Tests, evaluation_sets
from .loading import check_model, load_model, of_hub
from .pipeline import Progress
from .plan import Plan
from .processes import joined, place
from .provenance import fingerprint
from .run_directory import Run, differing, write_json

if TYPE_CHECKING:
    from .data.records import RecordSet
    from .evaluate import Evaluation
    from .evaluate.robustness import Robustness
    from .unlearn.log import UnlearnLog

#: What the demo runs with: a model this small has 190 edges, and unlearns at a larger step than a language model would.
DEMO = Settings(
    localize=LocalizeSettings(edges=0.1, neurons=0.1, batch_size=32),
    unlearn=UnlearnSettings(objective="npo-stranger", lr=4e-4, steps=500, batch_size=16, damping=0.01, metric_every=40,
                            floor=0.06),
    evaluate=EvaluateSettings(rouge_limit=72, max_new_tokens=8),
)

#: The file beside a run's robustness that says of which evaluation it is.
EVALUATED = "evaluated.json"


def localize(run: Run, *, model: str, forget: str, retain: Mapping[str, str], settings: Settings,
             progress: Progress) -> Plan:
    """Find circuits and make the plan; stages that are there already are read back.

    Processes of torch.distributed share the attribution, and each calls this; the first of them writes the stages.
    """
    if of_hub(model):  # which may take long, and longest without a network
        progress(f"model      {model} is no folder here: asking the hub for it")
    network, tokenizer = _loaded(run, model, settings)
    sets = _records(run, forget, retain)
    if "data" not in run.manifest and place()[0] == 0:
        run.update(data={name: records.sha256 for name, records in sets.items()})
    return pipeline.localize(network, tokenizer, sets["forget"],
                             {name: s for name, s in sets.items() if name != "forget"}, settings.localize,
                             data=settings.data, seed=settings.seed, progress=progress,
                             keep=lambda stage, make: _kept(run, stage, make))


def _loaded(run: Run, source: str, settings: Settings) -> tuple[Any, Any]:
    """The model of a run and its tokenizer. What it holds is written down the first time, and compared from then on.

    Raises:
        RunError: it is not the one that the run was begun with.
    """
    network, tokenizer = load_model(source, settings)
    mine = {"fingerprint": fingerprint(network), "dtype": settings.dtype}
    recorded = run.manifest.get("model")
    if recorded is None and place()[0] == 0:
        run.update(model=mine)
    elif recorded is not None and recorded["dtype"] == mine["dtype"] and recorded != mine:
        raise RunError(f"{run.folder} was made from another model: the weights in {source} have changed since; choose another"
                       " folder with -o, or put the model back")
    return network, tokenizer


def _records(run: Run, forget: str, retain: Mapping[str, str]) -> dict[str, RecordSet]:
    """The record sets of a run, ``forget`` first.

    Raises:
        RunError: they are not the ones that it was localized with.
    """
    sets = read_sets(forget, retain)
    recorded = run.manifest.get("data")
    for name, records in sets.items():
        if recorded is not None and recorded.get(name) != records.sha256:
            raise RunError(f"{run.folder} was made from other records: the set {name} has changed since; choose another folder"
                           " with -o, or put the records back")
    return sets


def explain(run: Run, nodes: Sequence[str]) -> list[str]:
    """Why nodes of a run's assignment have their roles, in words.

    Raises:
        RunError: the run has no assignment yet, or one in surgical mode, or is a baseline's.
        CircuitError: there is no such node.
    """
    from .logic import Explainer
    from .pipeline import objectives

    settings = Settings.from_dict(run.manifest["settings"], source=str(run.folder)).localize
    if settings.method != "clue":
        raise RunError(f"{run.folder} was made with method = {settings.method}, which gives nodes no roles: only those of"
                       " method = clue are explained")
    run.require("assignment", "localize")
    if settings.mode == "surgical":
        raise RunError(f"{run.folder} was made with mode = surgical: only roles in conflict mode are explained")
    scores, circuits = (_kept(run, stage, dict) for stage in ("scores", "circuits"))
    measured = _kept(run, "editability", dict) if settings.weighting == "editability" else None
    graph = circuits["forget"].graph
    explainer = Explainer([circuits["forget"]], [found for name, found in circuits.items() if name != "forget"],
                          semantics=settings.semantics, **objectives(scores, graph, settings, measured))
    planned = _kept(run, "assignment", dict).role
    lines = []
    for node in nodes:
        found = explainer.explain(node)
        lines += found.lines(graph.name, explainer.assignment.cost)
        if planned[found.node] != found.role:
            lines.append("not edited: its role is not stable under the uncertainty of the scores")
    return lines


def unlearn(run: Run, settings: Settings, progress: Progress) -> bool:
    """Train the planned weights and save the model, whole, into the run's ``model`` stage.

    Processes that ``torchrun`` started share every step; the first of them writes and reports.

    Returns:
        whether this process is the first.

    Raises:
        RunError: another process is unlearning in this run.
    """
    with joined(settings.device) as first, run.claimed("model") if first and not run.has("model") else nullcontext():
        _unlearn(run, settings, progress if first else lambda message: None, writes=first)
    return first


def _unlearn(run: Run, settings: Settings, progress: Progress, *, writes: bool) -> None:
    from .report.svg import percent
    from .unlearn.checkpoint import FILE as CHECKPOINT
    from .unlearn.loop import unlearn as train

    run.require("plan", "localize")
    if run.has("model"):
        progress(f"model      {run.path('model')} is there already")
        return
    inputs = run.inputs
    sets = _records(run, inputs["forget"], inputs["retain"])
    network, tokenizer = load_model(inputs["model"], settings)

    plan = Plan.load(run.folder)
    checkpoint = run.path(".training")  # so that a killed job goes on at the step it came to
    if (checkpoint / CHECKPOINT).exists():
        progress(f"unlearn    goes on from {checkpoint / CHECKPOINT}")
    log = train(network, tokenizer, sets["forget"], {name: s for name, s in sets.items() if name != "forget"},
                plan, settings.unlearn, data=settings.data, seed=settings.seed, progress=progress, checkpoint=checkpoint)
    if not writes:
        return
    verification = ""
    with run.stage("model", lambda: {"settings": settings.to_dict(), "verification": verification}) as folder:
        network.save_pretrained(folder)  # type: ignore[operator]
        tokenizer.save_pretrained(folder)
        log.save(folder / "training.json")
        verification = _verified(inputs["model"], folder, plan)
    if log.tuning is not None:
        progress(_tuned(log))
    shutil.rmtree(checkpoint, ignore_errors=True)
    progress(f"model      {percent(log.final_forgotten)} of the forget records are forgotten after {log.steps} steps of"
             f" {log.objective}" + ("" if log.stopped_early or log.final_forgotten == 1 or not settings.unlearn.floor else
                                    ": the steps ran out (--steps)"))
    if log.steps and not (log.forgotten < 1).any():
        progress("note       no forget record was known to the model when training began, so there was nothing to forget: is it"
                 " the right --model, and asked as it was taught (--chat)?")
    if log.skipped:
        progress(f"model      {log.skipped} steps were not finite and moved nothing")
    progress(f"model      {log.moved} of {log.planned} planned weights moved")
    progress(f"verify     {verification}")


def _tuned(log: UnlearnLog) -> str:
    """What was tried out, and what that left of the retain records held back; a loss is said as such."""
    from .report.svg import percent

    assert log.tuning is not None
    before, kept = log.tuning["before"], log.tuning["kept"]
    trials = len(log.tuning["trials"])
    text = (f"tuned      {trials} trial{'s' * (trials != 1)} on retain records held back: lr {log.tuning['lr']:.3g}, retain"
            f" weight {log.tuning['retain_weight']:g}")
    if kept is not None and before is not None:
        text += f"; they keep {percent(kept)} of their answers' probability (before: {percent(before)})"
        if kept < 0.9 * before:
            text += ("\nwarning    much of what must stay is lost at every learning rate that forgets: give more retain records"
                     " (or ones more like these), more --steps or --trials, or a higher --floor")
    return text


def _verified(before: str, after: Path, plan: Plan) -> str:
    """What the bit-by-bit comparison says of a model that has just been saved.

    Raises:
        RunError: a weight outside the plan changed.
    """
    from .plan import verify

    if not Path(before).is_dir():
        return f"not compared: {before} is no local folder (compare its files with `clue plan verify`)"
    try:
        verification = verify(before, after, plan)
    except PlanError as error:  # stored in another format or dtype: nothing is wrong with the new model
        return f"not compared: {error}"
    if not verification.ok:
        raise RunError(f"the unlearned model is thrown away: {verification}")
    return str(verification)


def evaluate(run: Run, settings: Settings, tests: Tests, progress: Progress) -> dict[str, Evaluation]:
    """Measure the model before and after unlearning (and a gold model, when one is given)."""
    from .data.records import overlap
    from .evaluate import Evaluation
    from .evaluate import evaluate as measure
    from .evaluate.evaluation import difference

    run.require("model", "unlearn")
    names = ("before", "after", "gold")
    if run.has("evaluation"):
        stored = {name: run.path("evaluation") / f"{name}.json" for name in names}
        return {name: Evaluation.load(path) for name, path in stored.items() if path.exists()}
    inputs = run.inputs
    used = _records(run, inputs["forget"], inputs["retain"])
    sets, overlaps = evaluation_sets(used, tests, settings.seed)
    for name, count in overlaps.items():
        progress(f"note       {name}: {count} evaluated records were also used to localize and retain; give --test for"
                 " an independent number")
    other = len(sets.forget) - overlap(sets.forget, used["forget"])
    if other:
        progress(f"note       forget: {other} of {len(sets.forget)} evaluated records are not in the forget set of this run")
    folders = {"before": inputs["model"], "after": str(run.path("model"))}
    stored_gold = Evaluation.load(tests.gold) if tests.gold and Path(tests.gold).is_file() else None
    if tests.gold and stored_gold is None:
        folders["gold"] = tests.gold
    reference = load_model(tests.reference, settings)[0] if tests.reference else None
    found = {}
    for name, source in folders.items():
        network, tokenizer = _loaded(run, source, settings) if name == "before" else load_model(source, settings)
        found[name] = measure(network, tokenizer, sets, settings.evaluate, data=settings.data, seed=settings.seed,
                              reference=reference)
        del network  # before the next one is loaded: there may be no room for two
        progress(f"evaluate   {name}")
    if stored_gold is not None:
        found["gold"] = stored_gold
        others = [name for name, result in found["after"].detail.items()
                  if name in stored_gold.detail and stored_gold.detail[name].sha256 != result.sha256]
        if others:
            progress(f"note       {tests.gold} was measured on other records of {', '.join(others)}: its numbers there cannot"
                     " be compared")
        if reason := difference(found["after"], stored_gold, (), ("truth_mean", "count_eos", "min_k")):
            progress(f"note       {tests.gold}: {reason}")
    with run.stage("evaluation", lambda: {"settings": settings.to_dict(), "tests": asdict(tests)}) as folder:
        for name, evaluation in found.items():
            evaluation.save(folder / f"{name}.json")
        write_json(folder / "overlaps.json", overlaps)
    return found


def robustness(run: Run, settings: Settings, tests: Tests, progress: Progress) -> dict[str, Robustness]:
    """Try to bring back what each evaluated model forgot; the models themselves stay as they are.

    Raises:
        RunError: it was done already with other settings.
    """
    from .evaluate.robustness import stress

    run.require("evaluation", "evaluate")
    if run.has("robustness"):
        found = _tried(run)
        for one in found.values():
            if other := differing(one.settings["robustness"], asdict(settings.robustness)):
                raise RunError(f"{run.path('robustness')} was made with {other}: remove it to make it again")
        return found
    inputs = run.inputs
    sets, _ = evaluation_sets(_records(run, inputs["forget"], inputs["retain"]), tests, settings.seed)
    folders = {"before": inputs["model"], "after": str(run.path("model"))}
    if tests.gold and not Path(tests.gold).is_file():
        folders["gold"] = tests.gold
    found = {}
    for name, source in folders.items():
        network, tokenizer = _loaded(run, source, settings) if name == "before" else load_model(source, settings)
        found[name] = stress(network, tokenizer, sets, settings.robustness, data=settings.data, seed=settings.seed)
        del network
        progress(f"robustness {name}")
    with run.stage("robustness", lambda: {"settings": settings.to_dict()}) as folder:
        for name, one in found.items():
            one.save(folder / f"{name}.json")
        write_json(folder / EVALUATED, _evaluated(run))
    return found


def _tried(run: Run) -> dict[str, Robustness]:
    """What brought back what was forgotten, by model; nothing where that was not tried.

    Raises:
        RunError: that was of other models, or on other records, than the evaluation is.
    """
    from .evaluate.robustness import Robustness

    paths = [run.path("robustness") / f"{name}.json" for name in ("before", "after", "gold")]
    of = run.path("robustness") / EVALUATED
    if of.exists() and json.loads(of.read_text()) != _evaluated(run):
        raise RunError(f"{run.path('robustness')} belongs to another evaluation than {run.path('evaluation')}: remove it, and"
                       " make it again with `clue evaluate --robustness`")
    return {path.stem: Robustness.load(path) for path in paths if path.exists()}


def _evaluated(run: Run) -> dict[str, str]:
    """SHA-256 of the evaluation's files."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(run.path("evaluation").glob("*.json"))}


def report(run: Run) -> Path:
    """Write ``report.html`` from the stages of a run, and return its path."""
    from .circuit.graph import Circuit
    from .evaluate import Evaluation
    from .logic import Assignment
    from .report import write_report
    from .unlearn.log import UnlearnLog

    run.require("evaluation", "evaluate")
    evaluations = {path.stem: Evaluation.load(path) for path in sorted(run.path("evaluation").glob("*.json"))
                   if path.stem in ("before", "after", "gold")}
    order = [name for name in ("before", "after", "gold") if name in evaluations]
    tried = _tried(run)
    target = run.folder / "report.html"
    write_report(
        target, title=f"Unlearning report: {run.folder.resolve().name}",
        evaluations={name: evaluations[name] for name in order},
        plan=Plan.load(run.folder),
        assignment=Assignment.load(run.path("assignment") / "assignment.json") if run.has("assignment") else None,
        circuits={path.stem: Circuit.load(path) for path in sorted(run.path("circuits").glob("*.safetensors"))},
        log=UnlearnLog.load(run.path("model") / "training.json"),
        robustness={name: tried[name] for name in order if name in tried}, provenance=run.manifest)
    return target


def run_all(run: Run, *, model: str, forget: str, retain: Mapping[str, str], settings: Settings, tests: Tests,
            progress: Progress) -> dict[str, Evaluation]:
    """Every stage in turn, once everything that the last ones read has been looked at."""
    from .evaluate import Evaluation
    from .evaluate.harness import require_harness

    used = _records(run, forget, retain)
    if not run.has("evaluation"):
        evaluation_sets(used, tests, settings.seed)
        if settings.evaluate.harness:
            require_harness()
        for source in (tests.gold, tests.reference):
            if source and source == tests.gold and Path(source).is_file():
                Evaluation.load(source)
            elif source:
                check_model(source)
    localize(run, model=model, forget=forget, retain=retain, settings=settings, progress=progress)
    unlearn(run, settings, progress)
    found = evaluate(run, settings, tests, progress)
    progress(f"report     {report(run)}")
    return found


def demo(folder: Path, *, setting: str, seed: int, progress: Progress) -> dict[str, Any]:
    """The whole job on the embedded world: two small models are trained (and cached), one forgets.

    Returns:
        ``before``, ``after`` and ``gold`` (retrained without the forget people), each with ``forget``,
        ``forget_paraphrase``, ``retain``, ``skills`` and ``mia_auc``; ``plan`` with the counts of nodes per role and
        ``weights_changed``; ``verify``, the bit-by-bit comparison.
    """
    from .data.world import build_world, cached_models, save_world
    from .plan import verify
    from .report import table

    settings = replace(DEMO, seed=seed)
    world = build_world(setting, seed)

    def on_step(step: int, loss: float) -> None:
        if step % 100 == 0:
            progress(f"train      step {step}, loss {loss:.3f}")

    progress(f"world      {setting}: {len(world.forget)} records to forget, {len(world.retain)} to keep, "
             f"{len(world.retain_unseen)} only to check on")
    base, gold = cached_models(world, seed=seed, on_step=on_step)
    home = folder.resolve()
    data = {name: str(home / "world" / f"{name}.jsonl") for name in world.sets()}
    inputs: dict[str, Any] = {"model": str(home / "before"), "forget": data["forget"],
              "retain": {"retain": data["retain"], **{name: data[f"{name}_train"] for name in world.skills}}}
    run = Run.create(folder, settings.to_dict(), kind="demo", inputs=inputs)
    try:
        with run.stage("world") as place:
            save_world(world, place)
        for name, network in (("before", base), ("gold", gold)):
            with run.stage(name) as place:
                network.save_pretrained(place)
                world.tokenizer.save_pretrained(place)
        tests = Tests(benchmark=f"world:{setting}", gold=str(home / "gold"))
        found = run_all(run, **inputs, settings=settings, tests=tests, progress=progress)
    except BaseException:
        run.discard()
        raise
    plan = Plan.load(folder)
    verification = verify(run.path("before"), run.path("model"), plan)
    print(table(found))
    document = {name: evaluation.to_json() for name, evaluation in found.items()}
    return {**document, "plan": {**plan.counts(), "weights_changed": plan.weights_changed},
            "verify": {"ok": verification.ok, "planned": verification.planned, "changed": verification.changed},
            "setting": setting, "seed": seed, "report": str(folder / "report.html")}


def _kept(run: Run, stage: str, make: Callable[[], Any]) -> Any:
    """A stage read back from the run, or made and stored."""
    from .circuit.attribution import Scores
    from .circuit.graph import Circuit
    from .data.pairs import Pairs
    from .editability import Editability
    from .logic import Assignment

    by_set: dict[str, Any] = {"pairs": Pairs, "scores": Scores, "circuits": Circuit}
    folder = run.path(stage)
    if stage in by_set:
        if run.has(stage):
            try:
                order = json.loads((folder / "sets.json").read_text())
                whole = set(order) == set(run.manifest.get("data") or order)
            except (OSError, ValueError, TypeError):
                whole = False
            if not whole:
                raise RunError(f"{folder / 'sets.json'} is damaged: it should name the sets of {folder}; remove that folder to"
                               " make it again")
            return {name: by_set[stage].load(folder / f"{name}.safetensors") for name in order}
        if place()[0]:
            return make()
        with run.stage(stage) as folder:
            made = make()
            for name, value in made.items():
                value.save(folder / f"{name}.safetensors")
            write_json(folder / "sets.json", list(made))
        return made
    kinds: dict[str, tuple[Any, str]] = {"plan": (Plan, ""), "editability": (Editability, ""),
                                         "assignment": (Assignment, "assignment.json")}
    kind, file = kinds[stage]
    if run.has(stage):
        return kind.load(folder / file)
    if place()[0]:
        return make()
    with run.stage(stage) as folder:
        made = make()
        made.save(folder / file)
    return made
