"""The package as others meet it: its callables say what they take, its types are there for their checkers, settings theirs."""

from __future__ import annotations

import inspect
import json
import pydoc
import re
import tomllib
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clue
from clue import baselines
from clue.config import RobustnessSettings, check
from clue.errors import ClueError
from clue.evaluate import EvaluationSets, stress
from clue.evaluate.measure import evaluate
from clue.plan import Plan
from clue.unlearn import tune
from clue.unlearn.loop import unlearn


def test_callable_packages_have_the_signature_of_what_they_call() -> None:
    assert inspect.signature(clue.unlearn) == inspect.signature(unlearn)
    assert inspect.signature(clue.evaluate) == inspect.signature(evaluate)
    for package, function in ((clue.unlearn, unlearn), (clue.evaluate, evaluate)):
        said = pydoc.render_doc(package)  # what help() prints
        assert f"clue.{function.__name__} - {function.__name__}(...): {inspect.getdoc(function).splitlines()[0]}" in said
        assert "Raises:" in said and "The package. " in said
    assert Path(inspect.getfile(clue)).with_name("py.typed").exists()


def test_the_source_distribution_holds_what_make_runs_and_make_takes_the_pythons_that_it_names() -> None:
    root = Path(__file__).parent.parent
    project, makefile = tomllib.loads((root / "pyproject.toml").read_text()), (root / "Makefile").read_text()
    folders = {f"/{name}" for name in re.findall(r"(\w+)/\$\$name", makefile)}
    assert folders == {"/benchmarks"} and folders.isdisjoint(project["tool"]["scikit-build"]["sdist"]["exclude"])
    named = {text.rpartition(" ")[2] for text in project["project"]["classifiers"] if re.search(r":: 3\.\d+$", text)}
    tried = re.search(r"^CANDIDATES := python3 (.*)$", makefile, re.M)
    assert tried and {text.removeprefix("python") for text in tried[1].split()} == named


@pytest.mark.parametrize(("settings", "message"), [
    (clue.UnlearnSettings(steps=20.5), "steps = 20.5 must be a whole number"),  # type: ignore[arg-type]
    (clue.UnlearnSettings(lr="1e-3"), "lr = '1e-3' must be a number"),  # type: ignore[arg-type]
    (clue.UnlearnSettings(batch_size=None), "batch_size = None must be a whole number"),  # type: ignore[arg-type]
    (clue.UnlearnSettings(steps=True), "steps = True must be a whole number"),
    (clue.UnlearnSettings(metric=1), "metric = 1 must be true or false"),  # type: ignore[arg-type]
    (clue.UnlearnSettings(refusals=3), "refusals = 3 must be a text"),  # type: ignore[arg-type]
    (clue.LocalizeSettings(ratio="0.2"), "ratio = '0.2' must be a number"),  # type: ignore[arg-type]
    (clue.EvaluateSettings(bootstrap=1.0), "bootstrap = 1.0 must be a whole number"),  # type: ignore[arg-type]
])
def test_settings_of_another_type_are_named(settings: Any, message: str) -> None:
    with pytest.raises(ClueError, match=message):
        check(settings)


def test_settings_of_another_stage_are_named() -> None:
    given: Any = {"lr": 1, "steps": np.int64(3), "retain_weight": np.float32(0.5)}
    check(clue.UnlearnSettings(**given), clue.UnlearnSettings)
    for wrong, wanted in ((clue.LocalizeSettings(), clue.UnlearnSettings), (clue.UnlearnSettings, clue.UnlearnSettings),
                          (replace(RobustnessSettings()), clue.EvaluateSettings), (3, clue.LocalizeSettings)):
        with pytest.raises(ClueError, match=rf"settings must be an object such as clue.{wanted.__name__}\(...\), got"):
            check(wrong, wanted)


def test_settings_hold_plain_numbers() -> None:
    given: Any = {"lr": np.float32(0.5), "steps": np.int64(3), "floor": np.float64(0.25), "retain_weight": 1}
    found = clue.UnlearnSettings(**given)
    assert json.loads(json.dumps(asdict(found))) == asdict(clue.UnlearnSettings(lr=0.5, steps=3, floor=0.25, retain_weight=1))
    assert [type(x) for x in (found.lr, found.steps, found.retain_weight)] == [float, int, int]
    assert type(replace(found, steps=np.int32(4)).steps) is int


@pytest.mark.parametrize("seed", [-1, 1.5, "a", 2**63, True, None])
def test_seeds_are_checked(seed: Any) -> None:
    """Before anything else is looked at."""
    message = rf"seed = {seed!r} must be a whole number in 0\.\.2\^48 - 1"
    nothing: Any = None
    plan = Plan((), np.zeros(0, np.uint8), (), {})
    for call in (lambda: clue.localize(nothing, nothing, [], [], seed=seed),
                 lambda: stress(nothing, nothing, nothing, seed=seed),
                 lambda: baselines.localize("random", nothing, nothing, [], [], seed=seed),
                 lambda: clue.unlearn(nothing, nothing, [], [], plan, seed=seed),
                 lambda: tune(nothing, nothing, [], [], plan, seed=seed),
                 lambda: clue.evaluate(nothing, nothing, nothing, seed=seed)):
        with pytest.raises(ClueError, match=message):
            call()


def test_what_is_no_setting_and_no_set_is_named() -> None:
    nothing: Any = None
    plan = Plan((), np.zeros(0, np.uint8), (), {})
    wrong: Any = {"lr": 1}
    for call, message in (
            (lambda: tune(nothing, nothing, [], [], plan, wrong), "settings must be an object such as clue.UnlearnSettings"),
            (lambda: tune(nothing, nothing, [], [], plan, clue.UnlearnSettings(batch_size=0)), "batch_size = 0 must be at"),
            (lambda: clue.evaluate(nothing, nothing, wrong), r"clue.evaluate.EvaluationSets\(forget=..., .* got a dict"),
            (lambda: clue.evaluate(nothing, nothing, nothing, data=wrong), "clue.DataSettings"),
            (lambda: stress(nothing, nothing, nothing, data=wrong), "clue.DataSettings"),
            (lambda: stress(nothing, nothing, nothing), "got a NoneType")):
        with pytest.raises(ClueError, match=message):
            call()


def test_evaluation_sets_are_record_sets() -> None:
    forget, retain = (clue.read([(f"what is {name}", "it")], name) for name in ("one", "two"))
    with pytest.raises(ClueError, match="evaluation set retain must be a RecordSet, .* got a dict; more retain sets"):
        EvaluationSets(forget, {"retain": retain})  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["DataSettings", "LocalizeSettings", "UnlearnSettings", "EvaluateSettings"])
def test_the_help_of_settings_describes_each(name: str) -> None:
    settings = getattr(clue, name)
    text = settings.__doc__
    for field in fields(settings):
        assert f"\n    {field.name}: " in text
    assert max(map(len, text.splitlines())) <= 120
