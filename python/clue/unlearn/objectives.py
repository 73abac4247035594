"""Objectives: what forgetting and retention minimise, as functions of answer log-probabilities.

Labels are shifted once, in :func:`answer_log_probs`, and nowhere else. Two conventions, each its paper's own: gradient
ascent and the retain loss are means over all answer tokens of the batch; NPO works on the log-probability of a whole
answer (a sum over its tokens) and is a mean over records.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UnlearnSettings
from ..data.encoding import IGNORED


def token_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of every label that has a position before it to predict it.

    Args:
        logits: [batch, seq, vocabulary]; bf16 and fp16 are scored in float32.
        labels: int64 [batch, seq], the token *at* each position (not shifted), ``IGNORED`` (-100) where not scored.

    Returns:
        log p of each label, [batch, seq - 1], zero where it is not scored, and the boolean mask of the scored ones.
    """
    scored = labels[:, 1:] != IGNORED
    # The last position predicts nothing. It is computed all the same: cutting it off would copy the logits' gradient.
    target = F.pad(labels[:, 1:], (0, 1), value=0)
    if logits.dtype in (torch.bfloat16, torch.float16):
        logits = logits.float()
    chosen = logits.gather(-1, target.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    log_p = (chosen - torch.logsumexp(logits, dim=-1))[:, :-1]
    return log_p.masked_fill(~scored, 0.0), scored


def answer_log_probs(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each answer as a whole, and how many tokens it has.

    Args:
        logits: [batch, seq, vocabulary].
        labels: int64 [batch, seq], not shifted, ``IGNORED`` (-100) outside the answer.

    Returns:
        sum of log p over the answer's tokens, [batch], and the number of these tokens, int64 [batch].
    """
    log_p, scored = token_log_probs(logits, labels)
    return log_p.sum(-1), scored.sum(-1)


def nll(log_p: Tensor, n_tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood over all answer tokens of a batch: the retain loss."""
    return -log_p.sum() / n_tokens.sum()


def gradient_ascent(log_p: Tensor, n_tokens: Tensor, reference: Tensor | None, settings: UnlearnSettings) -> Tensor:
    """The negated :func:`nll` of the forget answers (GA, arXiv 2210.01504; token mean as in TOFU, arXiv 2401.06121)."""
    return -nll(log_p, n_tokens)


def negative_preference(log_p: Tensor, n_tokens: Tensor, reference: Tensor | None, settings: UnlearnSettings) -> Tensor:
    """NPO: ``-2/beta * mean log sigmoid(-beta * (log p - log p_ref))`` (arXiv 2404.05868, equation 3).

    ``log_p`` and ``reference`` are sums over an answer's tokens, [batch]; the reference is the model before unlearning.
    """
    if reference is None:
        raise ValueError("reference: NPO needs the log-probabilities of the model before unlearning, got None")
    return -2.0 / settings.beta * F.logsigmoid(-settings.beta * (log_p - reference)).mean()


@dataclass(frozen=True)
class Objective:
    """One way to forget.

    Attributes:
        forget: (log_p [batch], n_tokens [batch], reference [batch] or None, settings) -> scalar to minimise.
        reference: whether ``forget`` needs the log-probabilities of the model before unlearning.
        retain: whether conflict weights also get the gradient of the retain loss.
    """

    forget: Callable[[Tensor, Tensor, Tensor | None, UnlearnSettings], Tensor]
    reference: bool
    retain: bool


#: ``UnlearnSettings.objective`` -> objective. ``graddiff`` (arXiv 2203.12817) is gradient ascent plus the retain loss.
OBJECTIVES: dict[str, Objective] = {
    "ga": Objective(gradient_ascent, reference=False, retain=False),
    "graddiff": Objective(gradient_ascent, reference=False, retain=True),
    "npo": Objective(negative_preference, reference=True, retain=True),
}
