"""Objectives against formulas in plain NumPy, and the one shift of the labels against a hand-made example."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clue.config import UnlearnSettings
from clue.unlearn.objectives import OBJECTIVES, answer_log_probs, nll

SETTINGS = UnlearnSettings(beta=0.3)


def test_labels_are_shifted_once_by_hand() -> None:
    # Tokens 3 1 4 2 and the answer is "4 2": position 1 must predict 4 and position 2 must predict 2.
    labels = torch.tensor([[-100, -100, 4, 2]])
    logits = torch.zeros(1, 4, 5)
    logits[0, 1, 4] = np.log(4.0)  # p = 4 / (4 + 4) = 1/2
    logits[0, 2, 2] = np.log(12.0)  # p = 12 / (12 + 4) = 3/4
    logits[0, 0, 2] = logits[0, 3, 4] = 50.0  # what a second shift, or none, would read
    log_p, n_tokens = answer_log_probs(logits.requires_grad_(True), labels)
    assert n_tokens.tolist() == [2]
    assert log_p.item() == pytest.approx(np.log(0.5 * 0.75), abs=1e-6)
    log_p.sum().backward()
    assert logits.grad is not None
    assert logits.grad.abs().sum(-1)[0].gt(0).tolist() == [False, True, True, False]


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(3, 6, 7, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 7, (3, 6), generator=generator)
    labels[0, :3] = -100
    labels[1, :4] = labels[1, 5:] = -100
    labels[2, :2] = -100
    return logits, labels


def numpy_log_probs(logits: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    sums, counts = np.zeros(len(labels)), np.zeros(len(labels))
    for i, row in enumerate(labels):
        for t, label in enumerate(row):
            if label != -100:
                sums[i] += np.log(p[i, t - 1, label])
                counts[i] += 1
    return sums, counts


def test_objectives_match_their_formulas(batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, labels = batch
    log_p, n_tokens = answer_log_probs(logits, labels)
    sums, counts = numpy_log_probs(logits.numpy(), labels.numpy())
    np.testing.assert_allclose(log_p.numpy(), sums, rtol=1e-12)
    assert n_tokens.tolist() == counts.tolist() == [3, 1, 4]
    reference = np.array([-1.0, -4.0, -30.0])
    beta = SETTINGS.beta
    npo = np.mean(-2 / beta * np.log(1 / (1 + np.exp(beta * (sums - reference)))))
    assert nll(log_p, n_tokens).item() == pytest.approx(-sums.sum() / counts.sum(), rel=1e-12)
    for name, expected in (("npo", npo), ("ga", sums.sum() / counts.sum()), ("graddiff", sums.sum() / counts.sum())):
        got = OBJECTIVES[name].forget(log_p, n_tokens, torch.from_numpy(reference), SETTINGS)
        assert got.item() == pytest.approx(expected, rel=1e-12), name


def test_npo_weighs_each_answer_as_its_paper_says() -> None:
    # Equation 4 there: the gradient is gradient ascent's times 2 p^beta / (p^beta + p_ref^beta), which is 1 at the
    # reference and vanishes once an answer is forgotten.
    log_p = torch.tensor([-2.0, -2.0, -200.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-2.0, -1.0, -1.0], dtype=torch.float64)
    OBJECTIVES["npo"].forget(log_p, torch.ones(3), reference, SETTINGS).backward()
    ratio = np.exp(SETTINGS.beta * (log_p.detach().numpy() - reference.numpy()))
    assert log_p.grad is not None
    np.testing.assert_allclose(3 * log_p.grad.numpy(), 2 * ratio / (ratio + 1), rtol=1e-10)
    assert 3 * log_p.grad[0].item() == pytest.approx(1.0) and log_p.grad[2].item() < 1e-20


def test_half_precision_is_scored_in_float32() -> None:
    logits = torch.zeros(1, 2, 3000, dtype=torch.bfloat16)
    log_p, _ = answer_log_probs(logits, torch.tensor([[-100, 5]]))
    assert log_p.dtype == torch.float32 and log_p.item() == pytest.approx(-np.log(3000), abs=1e-4)


def test_only_ga_goes_without_retention() -> None:
    assert {name for name, objective in OBJECTIVES.items() if not objective.retain} == {"ga"}
