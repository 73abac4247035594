"""Objectives: what forgetting and retention minimise, as functions of what the model gives the tokens of answers.

Labels are shifted once, in :func:`token_log_probs`, and nowhere else. Two conventions, each its paper's own: gradient
ascent (plain or weighted), self-distillation, the refusal loss and both retain losses are means over all answer tokens
of the batch; NPO, SimNPO and DPO work on the log-probability of a whole answer and are means over records.

RMU works on the hidden states of one layer at all tokens of a record, prompt included, and means over tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import UnlearnSettings
from ..data.encoding import IGNORED
from ..errors import ClueError
from .twins import has_subject, made_up

if TYPE_CHECKING:
    from ..data.records import RecordSet


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


@dataclass(frozen=True)
class Hidden:
    """The residual stream behind one layer.

    Attributes:
        states: [batch, seq, d_model].
        before: the same under the model before unlearning.
        tokens: bool [batch, seq], false on padding.
        direction: [d_model], of length 1, drawn once per training from the seed: uniform in [0, 1), then normalised.
    """

    states: Tensor
    before: Tensor
    tokens: Tensor
    direction: Tensor

    def select(self, records: Tensor) -> Hidden:
        """Those of some of the records, given as bool [batch]."""
        return Hidden(self.states[records], self.before[records], self.tokens[records], self.direction)


@dataclass(frozen=True)
class Answers:
    """What an objective sees of a batch of answers.

    Attributes:
        token_log_p: [batch, seq], log-probability of every answer token, zero elsewhere.
        scored: bool [batch, seq], where answer tokens are predicted.
        reference: [batch], log-probability of each whole answer under the model before unlearning; None unless the
            objective asks for it.
        targets: int64 [tokens], the answer tokens one after the other, in the order of ``scored``.
        logits: [tokens, vocabulary] for these tokens, float32 or finer; None unless the objective asks for them.
        reference_logits: the same under the model before unlearning, given the objective's ``twins`` or strangers in place
            of the records where it has them.
        hidden: the hidden states that the objective asks for; None unless it does.
    """

    token_log_p: Tensor
    scored: Tensor
    reference: Tensor | None = None
    targets: Tensor | None = None
    logits: Tensor | None = None
    reference_logits: Tensor | None = None
    hidden: Hidden | None = None

    @property
    def log_p(self) -> Tensor:
        """Log-probability of each whole answer, [batch]: the sum over its tokens."""
        return self.token_log_p.sum(-1)

    @property
    def n_tokens(self) -> Tensor:
        """Number of tokens of each answer, int64 [batch]."""
        return self.scored.sum(-1)

    def select(self, records: Tensor) -> Answers:
        """The answers of some of the records, given as bool [batch]."""
        tokens = records.unsqueeze(1).expand_as(self.scored)[self.scored]
        targets, logits, before = (None if t is None else t[tokens] for t in (self.targets, self.logits, self.reference_logits))
        reference = None if self.reference is None else self.reference[records]
        hidden = None if self.hidden is None else self.hidden.select(records)
        return Answers(self.token_log_p[records], self.scored[records], reference, targets, logits, before, hidden)


def answer_rows(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logits that predict an answer token, [tokens, vocabulary], bf16 and fp16 as float32, and the tokens, int64
    [tokens]; arguments as for :func:`answer_log_probs`."""
    scored = labels[:, 1:] != IGNORED
    rows = logits[:, :-1][scored]
    return rows.float() if rows.dtype in (torch.bfloat16, torch.float16) else rows, labels[:, 1:][scored]


def _hidden(answers: Answers) -> Hidden:
    if answers.hidden is None:
        raise ClueError("the objective needs hidden states, which it was not given: say so in its Objective (hidden=True)")
    return answers.hidden


def _needed(value: Tensor | None, what: str) -> Tensor:
    if value is None:
        raise ClueError(f"the objective needs {what}, which it was not given: say so in its Objective")
    return value


def _refusals(answers: Answers | None) -> Answers:
    if answers is None:
        raise ClueError("the objective needs refusals, which it was not given: say so in its Objective (refusals=True)")
    return answers


def gradient_ascent(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """The negated :func:`nll` of the forget answers (GA, arXiv 2210.01504; token mean as in TOFU, arXiv 2401.06121)."""
    return -nll(answers.log_p, answers.n_tokens)


def weighted_gradient_ascent(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """WGA: mean over answer tokens of ``p^alpha * log p``, the weight ``p^alpha`` taken as a constant (arXiv 2502.19301,
    weighted gradient ascent). ``alpha`` 0 is gradient ascent."""
    weight = (settings.wga_alpha * answers.token_log_p.detach()).exp()
    return (weight * answers.token_log_p).sum() / answers.n_tokens.sum()


def negative_preference(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """NPO: ``-2/beta * mean log sigmoid(-beta * (log p - log p_ref))`` (arXiv 2404.05868, equation 3), with p of whole
    answers."""
    ratio = answers.log_p - _needed(answers.reference, "the log-probabilities of the model before unlearning")
    return -2.0 / settings.beta * F.logsigmoid(-settings.beta * ratio).mean()


def counterfactual_preference(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """NPO plus ``counterfactual`` times the mean over records of the summed cross-entropy, at every answer token, of the
    model to what the model before unlearning gave the same token behind a corrupted twin of the prompt.

    NPO alone says what not to answer. Where the probability goes is left open, and the forgotten answer stays likelier
    than others like it; the second term sends it to the answers that others would get.
    """
    away = negative_preference(answers, refusals, settings)
    log_p = _needed(answers.logits, "logits").log_softmax(-1)
    twin = _needed(answers.reference_logits, "the logits behind corrupted twins").softmax(-1)
    towards = -(twin * log_p).sum() / len(answers.n_tokens)
    return away + settings.counterfactual * towards


def divergence(logits: Tensor, before: Tensor) -> Tensor:
    """``KL(p_before || p)`` over the vocabulary at every token, in nats, [tokens]; both logits [tokens, vocabulary]."""
    log_p, reference = logits.log_softmax(-1), before.log_softmax(-1)
    return (reference.exp() * (reference - log_p)).sum(-1)


def from_before(answers: Answers) -> Tensor:
    """:func:`divergence` of the model from the model before unlearning at every answer token, [tokens]."""
    return divergence(_needed(answers.logits, "logits"),
                      _needed(answers.reference_logits, "the logits of the model before unlearning"))


def towards_strangers(answers: Answers, settings: UnlearnSettings) -> Tensor:
    """``stranger_weight`` times the mean over records of the summed :func:`divergence` from what the model before unlearning
    gave the same answer when it was asked about a stranger."""
    return settings.stranger_weight * from_before(answers).sum() / len(answers.n_tokens)


def simple_negative_preference(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """SimNPO: ``-2/beta * mean log sigmoid(-beta/|y| * log p - gamma)`` (arXiv 2410.07163, the SimNPO loss), with |y| the
    number of tokens of an answer; no reference model."""
    beta, gamma = settings.simnpo_beta, settings.simnpo_gamma
    return -2.0 / beta * F.logsigmoid(-beta * answers.log_p / answers.n_tokens - gamma).mean()


def preference(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """DPO with a refusal as the preferred answer and the forget answer as the other one (IdkPO).

    ``-1/beta * mean log sigmoid(beta * (log r/r_ref - log p/p_ref))`` with r of the refusal and p of the forget answer:
    arXiv 2305.18290, equation 7, over beta as in arXiv 2404.05868, so that the gradient does not shrink with beta.
    """
    refusals, what = _refusals(refusals), "the log-probabilities of the model before unlearning"
    ratio = refusals.log_p - _needed(refusals.reference, what) - (answers.log_p - _needed(answers.reference, what))
    return -1.0 / settings.beta * F.logsigmoid(settings.beta * ratio).mean()


def refusal(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """The :func:`nll` of refusals to the forget questions (TOFU's preference optimization, arXiv 2401.06121, section on
    unlearning algorithms; CLUE's PO). The forget answer itself does not enter; as with every objective a record's
    training ends once its answer is forgotten (``floor``)."""
    refusals = _refusals(refusals)
    return nll(refusals.log_p, refusals.n_tokens)


def self_distillation(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """UNDIAL: cross-entropy to the model before unlearning, the answer token's logit lowered by a constant (arXiv
    2402.10052, self-distillation with adjusted logits).

    Mean over answer tokens of ``-sum_v softmax(z_ref - strength * onehot(token))_v * log softmax(z)_v``.
    """
    logits = _needed(answers.logits, "logits")
    adjusted = _needed(answers.reference_logits, "the logits of the model before unlearning").clone()
    token = _needed(answers.targets, "the answer tokens").unsqueeze(-1)
    adjusted.scatter_add_(-1, token, adjusted.new_full(token.shape, -settings.undial_strength))
    return -(adjusted.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def misdirection(answers: Answers, refusals: Answers | None, settings: UnlearnSettings) -> Tensor:
    """RMU's forget loss: mean over tokens and channels of ``(h - c * u)^2``, h the hidden states of the forget records
    behind one layer and u a random direction of length 1 (arXiv 2403.03218, equation 1, over d_model as in the released
    code, which c = 6.5 and alpha = 1200 belong to)."""
    hidden = _hidden(answers)
    return (hidden.states[hidden.tokens] - settings.rmu_c * hidden.direction).square().mean()


def retain_hidden(answers: Answers, settings: UnlearnSettings) -> Tensor:
    """RMU's retain loss: ``alpha`` times the mean over tokens and channels of ``(h - h_before)^2`` (arXiv 2403.03218,
    equations 2 and 3)."""
    hidden = _hidden(answers)
    return settings.rmu_alpha * (hidden.states - hidden.before)[hidden.tokens].square().mean()


def retain_likelihood(answers: Answers, settings: UnlearnSettings) -> Tensor:
    """The :func:`nll` of the retain answers (arXiv 2203.12817)."""
    return nll(answers.log_p, answers.n_tokens)


def retain_divergence(answers: Answers, settings: UnlearnSettings) -> Tensor:
    """Mean over the retain answers' tokens of ``KL(p_ref || p)`` over the vocabulary (KL minimization in TOFU, arXiv
    2401.06121, which means over records first; the mean over tokens is that of the other retain loss)."""
    return from_before(answers).mean()


#: (forget answers, a refusal to each of their questions or None, settings) -> scalar to minimise
Forget = Callable[[Answers, Answers | None, UnlearnSettings], Tensor]
#: (retain answers, settings) -> scalar to minimise
Retain = Callable[[Answers, UnlearnSettings], Tensor]


@dataclass(frozen=True)
class Objective:
    """One way to forget, and to keep the rest.

    Attributes:
        forget: the forget loss, called with the records that are not forgotten yet.
        retain: the loss whose gradient conflict weights also get; None leaves retention out.
        reference: whether ``forget`` needs the answers' log-probabilities before unlearning, which are computed once.
        refusals: whether ``forget`` needs refusals.
        forget_logits, retain_logits: whether the loss needs the logits of the forget or retain answers, the model's and
            those before unlearning. The latter are computed in every step with the planned weights as they were
            (:class:`~clue.unlearn.reference.ReferenceWeights`).
        twins: whether the forget answers' logits before unlearning are those behind corrupted twins of their prompts
            (:mod:`clue.unlearn.twins`), another twin in every step.
        towards: a loss of all forget records, forgotten ones too, whose logits before unlearning are those behind a
            stranger's prompt (:func:`~clue.unlearn.twins.strangers`), the same in every step. Training then goes on until
            the model's :func:`divergence` from them is at most ``stranger_near``. Needs ``forget_logits``.
        hidden: whether both losses need the hidden states behind layer ``rmu_layer``, the model's and those before
            unlearning; only planned weights up to this layer then have a gradient.
    """

    forget: Forget
    retain: Retain | None = retain_likelihood
    reference: bool = False
    refusals: bool = False
    forget_logits: bool = False
    retain_logits: bool = False
    twins: bool = False
    hidden: bool = False
    towards: Retain | None = None

    def __post_init__(self) -> None:
        if self.towards is not None and (self.twins or not self.forget_logits):
            raise ClueError("an Objective goes towards strangers (towards), in place of twins, by the logits of both: give it"
                            " forget_logits=True and leave twins out")


#: ``UnlearnSettings.objective`` -> objective. ``graddiff`` (arXiv 2203.12817) is gradient ascent plus the retain loss.
OBJECTIVES: dict[str, Objective] = {
    "npo": Objective(negative_preference, reference=True),
    "npo-cf": Objective(counterfactual_preference, reference=True, forget_logits=True, twins=True),
    "npo-stranger": Objective(negative_preference, reference=True, forget_logits=True, towards=towards_strangers),
    "graddiff": Objective(gradient_ascent),
    "ga": Objective(gradient_ascent, retain=None),
    "npo-kl": Objective(negative_preference, retain_divergence, reference=True, retain_logits=True),
    "ga-kl": Objective(gradient_ascent, retain_divergence, retain_logits=True),
    "simnpo": Objective(simple_negative_preference),
    "dpo": Objective(preference, reference=True, refusals=True),
    "refusal": Objective(refusal, refusals=True),
    "undial": Objective(self_distillation, forget_logits=True),
    "wga": Objective(weighted_gradient_ascent),
    "rmu": Objective(misdirection, retain_hidden, hidden=True),
}


def suited(given: Any, forget: RecordSet, retain: Mapping[str, RecordSet]) -> Any:
    """What was given for an objective, with ``auto`` made out: ``npo-stranger`` where a stranger can be made up for the subject
    of every forget record, ``npo-cf`` where every one has a prompt and retain records have prompts that may stand in for it,
    ``npo`` elsewhere."""
    if given != "auto":
        return given
    donors = [record for records in retain.values() for record in records if record.prompt]
    if made_up(forget, donors) and all(has_subject(record) for record in forget):
        return "npo-stranger"
    return "npo-cf" if donors and all(record.prompt for record in forget) else "npo"


def objective_of(given: Any) -> Objective:
    """An objective from its name, itself, or a forget loss alone, which then gets the log-probabilities before
    unlearning and the likelihood as its retain loss.

    Raises:
        ClueError: it is neither.
    """
    if isinstance(given, Objective):
        return given
    if isinstance(given, str) and given in OBJECTIVES:
        return OBJECTIVES[given]
    if callable(given):
        return Objective(given, reference=True)
    raise ClueError(f"objective = {given!r} is neither one of {', '.join(OBJECTIVES)} nor an Objective nor a function"
                    " (answers, refusals, settings) -> loss")
