"""``clue doctor``: every fact it promises, and no crash where something is missing."""

from __future__ import annotations

import json
import sys
from importlib import metadata

import pytest

from clue import doctor
from clue.cli import main


def test_the_versions_are_those_installed() -> None:
    found = doctor.versions()
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["torch"] == metadata.version("torch")


def test_the_report_names_every_part(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["versions"]["cadical"].startswith("3.")
    assert set(report["kernels"]) >= {"neuron_attribution", "masked_adamw"}
    assert set(report["kernels"].values()) <= set(report["isas"])
    assert report["torch"]["threads"] >= 1
    assert set(report["extras"]) == {"parquet", "datasets", "gguf", "lm-eval"}
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for word in ("clue", "python", "torch", "transformers", "numpy", "cadical", "processor", "gpu", "CUDA", "cache"):
        assert word in text


def test_a_part_that_does_not_load_is_a_problem_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "clue._core", None)
    report = doctor.diagnose()
    assert len(report["problems"]) == 1
    assert "clue._core" in report["problems"][0]
    assert "make setup" in report["problems"][0]
    assert "problem" in doctor.describe(report)


def test_the_cache_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLUE_CACHE", "elsewhere")
    assert str(doctor.cache_folder()) == "elsewhere"
    monkeypatch.delenv("CLUE_CACHE")
    assert doctor.cache_folder().parts[-2:] == (".cache", "clue")
