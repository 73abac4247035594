"""The gradient of one step: forget and retain records run together, and every slice gets what its role asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..config import UnlearnSettings
from ..data.encoding import IGNORED, Batch, Example, collate
from ..errors import ClueError, ModelError, PlanError
from ..model.answers import answer_logits
from ..plan import Plan
from ..processes import place
from ..types import Role
from .hidden import HiddenStates
from .metric import RetainMetric
from .objectives import (
    Answers,
    Hidden,
    Objective,
    answer_log_probs,
    answer_rows,
    divergence,
    from_before,
    nll,
    token_log_probs,
)
from .reference import ReferenceWeights
from .sharing import added_up, shared_logits
from .sparse import SliceGradient, SparseGradients
from .twins import Twin, teacher_logits


class RoleGradient:
    """Runs the records of one step and combines the gradients of every slice by its role."""

    def __init__(self, model: nn.Module, plan: Plan, roles: Sequence[Role], objective: Objective,
                 settings: UnlearnSettings, metric: RetainMetric | None, before: ReferenceWeights,
                 pad: int, seed: int) -> None:
        if torch.is_inference_mode_enabled():
            raise ModelError("gradients are needed, and torch.inference_mode() gives none: call this outside of it")
        self._model, self._objective, self._settings, self._metric = model, objective, settings, metric
        self._before, self._roles = before, tuple(roles)
        self._pad, self._device = pad, next(model.parameters()).device
        # Rounded once per step, they still are finer than the weights that move by them.
        self.sparse = SparseGradients(model, plan, roles, half=settings.rounding == "stochastic")
        self._watch = HiddenStates(model, settings, seed) if objective.hidden else None
        if self._watch is not None and place()[1] > 1:
            raise ClueError("an objective of hidden states (rmu) runs in one process: start it without torchrun")

    @torch.enable_grad()
    def __call__(self, forget: Sequence[Example], reference: Tensor | None, retain: Sequence[Example],
                 retain_weight: float, twins: Sequence[Twin] = ()) -> tuple[dict[str, float], dict[str, Tensor]]:
        """The step's entries of the log, and the gradient of every parameter's planned slices, slices first.

        ``forget``: forget records, and after them as many refusals where the objective needs these; ``reference`` has an
        entry for each. ``twins`` stand in for the forget records where the model before unlearning is asked.
        """
        # The gradients of weights outside linear layers cannot be told apart within one pass.
        passes = [(forget, retain)]
        if self.sparse.dense and forget and retain:
            passes = [(forget, ()), ((), retain)]
        losses = dict.fromkeys(("forget_loss", "forget_probability", "forgotten", "divergence", "retain_loss"), math.nan)
        taken: list[dict[str, SliceGradient]] = []
        for forgets, retains in passes:
            self._pass(forgets, reference, retains, retain_weight, twins, losses)
            taken.append(added_up(self.sparse.take(), self.sparse))
        forget_part = {name: gradient.forget for name, gradient in taken[0].items()}
        self._measure(forget_part)
        combined: dict[str, Tensor] = {}
        for name, slices in self.sparse.planned.items():
            gradient, kept = forget_part[name], taken[-1][name].retain
            if gradient is None:  # nothing left to forget, or no record reaches these weights
                shape = (len(slices.index), *(n for i, n in enumerate(slices.shape) if i != slices.axis))
                dtype = slices.parameter.dtype if kept is None else kept.dtype
                gradient = torch.zeros(shape, dtype=dtype, device=slices.index.device)
            if kept is not None:
                gradient.index_add_(0, slices.conflict, kept)
            combined[name] = gradient
        return losses, combined

    def part(self, gradients: Mapping[str, Tensor], roles: Sequence[Role]) -> dict[str, Tensor]:
        """What a call gave, of the slices of some of the roles alone."""
        if set(roles) == set(self._roles):
            return dict(gradients)
        found = {}
        for name, slices in self.sparse.planned.items():
            conflict = torch.zeros(len(slices.index), dtype=torch.bool, device=slices.index.device)
            conflict[slices.conflict] = True
            chosen = conflict if Role.CONFLICT in roles else ~conflict
            if bool(chosen.any()):
                found[name] = gradients[name][chosen]
        return found

    def _pass(self, forget: Sequence[Example], reference: Tensor | None, retain: Sequence[Example],
              retain_weight: float, twins: Sequence[Twin], losses: dict[str, float]) -> None:
        """Forward and backward over forget records and then retain records, in one batch."""
        settings, objective = self._settings, self._objective
        end, kept = len(forget), slice(len(forget), len(forget) + len(retain))
        n = end // 2 if objective.refusals else end
        # Before the pass with gradients, which must not see its weights change.
        of_forget = self._reference_logits(twins or forget[:n]) if forget and objective.forget_logits else None
        of_retain = self._reference_logits(retain) if retain and objective.retain_logits else None
        batch = collate([*forget, *retain], self._pad, self._device)
        before = None
        if self._watch is not None:
            with self._before.restored(), self._watch.watching():
                answer_logits(self._model, batch)
                before = self._watch.states
        with nullcontext() if self._watch is None else self._watch.watching():
            logits, labels = shared_logits(self._model, self.sparse, batch, forget=end)
        log_p, scored = token_log_probs(logits, labels)

        def answers(rows: slice, reference_logits: Tensor | None) -> Answers:
            known = None if reference is None or rows is kept else reference[rows]
            if self._watch is not None and before is not None:
                hidden = Hidden(self._watch.states[rows], before[rows], batch.attention_mask.bool()[rows],
                                self._watch.direction)
                return Answers(log_p[rows], scored[rows], known, hidden=hidden)
            if reference_logits is None:
                return Answers(log_p[rows], scored[rows], known)
            found, targets = answer_rows(logits[rows], labels[rows])
            if twins and rows is not kept:
                reference_logits = teacher_logits(reference_logits, twins, targets)
            return Answers(log_p[rows], scored[rows], known, targets, found, reference_logits)

        parts: list[Tensor] = []
        if forget:
            probability, forgotten = forgotten_now(logits[:n], labels[:n], settings.floor)
            left = ~forgotten
            taught = answers(slice(0, n), of_forget)
            refusals = answers(slice(n, end), None) if objective.refusals else None
            loss = _scalar(objective.forget(taught, refusals, settings), "forget")
            if log_p.requires_grad and not loss.requires_grad and self._watch is None:
                raise ClueError("the objective's forget loss does not depend on the model: compute it from the answers'"
                                " token_log_p or logits, without detach, item or no_grad")
            if bool(left.all()):
                parts.append(loss)
            elif bool(left.any()):
                refusals = None if refusals is None else refusals.select(left)
                parts.append(_scalar(objective.forget(taught.select(left), refusals, settings), "forget"))
            if objective.towards is not None:
                parts.append(_scalar(objective.towards(taught, settings), "towards"))
                with torch.no_grad():
                    losses["divergence"] = float(from_before(taught).mean())
            losses |= {"forget_loss": loss.item(), "forget_probability": float(probability.mean()),
                       "forgotten": float(forgotten.double().mean())}
        if retain and objective.retain is not None:
            retained = answers(kept, of_retain)
            parts.append(retain_weight * _scalar(objective.retain(retained, settings), "retain"))
            losses["retain_loss"] = nll(retained.log_p, retained.n_tokens).item()
        if parts and not any(part.requires_grad for part in parts):
            if self._watch is None:
                raise ClueError("no loss of this step depends on a planned weight: compute the objective's losses from the"
                                " answers' token_log_p or logits, and leave out of the plan what the model does not use")
            raise PlanError("no planned weight lies at or below the layer whose hidden states the objective steers: raise"
                            " rmu_layer, or take another objective")
        if parts:
            torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]

    def _reference_logits(self, examples: Sequence[Example]) -> Tensor:
        """[answer tokens, vocabulary] of the model before unlearning, record after record."""
        with self._before.restored():
            return answer_rows(*answer_logits(self._model, collate(examples, self._pad, self._device)))[0]

    @torch.no_grad()
    def _measure(self, gradients: dict[str, Tensor | None]) -> None:
        """Put the forget gradients into the retain metric, at the norm they had.

        Forget weights too: that a circuit of the retain set does not lead through a node does not mean that retention
        cannot feel it (docs/findings.md, 1). The metric is a filter of directions. What it lets through is small beside
        the retain gradient, so that without the one common factor that restores the norm nothing would ever be forgotten.
        """
        if self._metric is None:
            return
        before = after = 0.0
        for name, gradient in gradients.items():
            if gradient is None:
                continue
            before += float(gradient.double().square().sum())
            # The metric takes slices as they lie in the weight.
            across = self.sparse.planned[name].axis == 1
            step = self._metric.precondition(name, gradient.T if across else gradient)
            gradients[name] = step = step.T if across else step
            after += float(step.double().square().sum())
        if after > 0:
            for gradient in gradients.values():
                if gradient is not None:
                    gradient.mul_(math.sqrt(before / after))


def _scalar(loss: object, name: str) -> Tensor:
    """A loss, once it is known to be one number."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{loss!r}"
        raise ClueError(f"the objective's {name} loss must be one number as a tensor, got {what}: average over the records")
    return loss.reshape(())


@torch.no_grad()
def forgotten_now(logits: Tensor, labels: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Per record the length-normalised answer probability, exp(mean log p of its tokens), and whether it is forgotten:
    this probability is at or below the floor, and greedy decoding does not give the answer. Both [batch].

    The mean of the tokens' own probabilities would not do: the tokens that carry no fact (the words of the phrasing)
    stay likely when the fact is long gone.
    """
    log_p, n_tokens = answer_log_probs(logits, labels)
    probability = (log_p / n_tokens).exp()
    target = labels[:, 1:]
    greedy = ((logits[:, :-1].argmax(-1) == target) | (target == IGNORED)).all(1)
    return probability, (probability <= floor) & ~greedy & (floor > 0)


@torch.no_grad()
def forgotten_of(model: nn.Module, records: Iterable[Batch], floor: float) -> tuple[float, float]:
    """:func:`forgotten_now` over a whole set: the mean probability and the share of forgotten records."""
    found = [forgotten_now(*answer_logits(model, batch), floor) for batch in records]
    probability, forgotten = (torch.cat(part).double().mean() for part in zip(*found, strict=True))
    return float(probability), float(forgotten)


@torch.no_grad()
def divergence_of(model: nn.Module, before: ReferenceWeights, records: Iterable[tuple[Sequence[Example], Sequence[Twin]]],
                  pad: int) -> float:
    """Mean :func:`~clue.unlearn.objectives.divergence` over the answer tokens of a whole set, in nats, of the model as it is
    from what the model before unlearning tells of the twins; records and twins batch by batch."""
    found, device = [], next(model.parameters()).device
    for examples, twins in records:
        rows, targets = answer_rows(*answer_logits(model, collate(examples, pad, device)))
        with before.restored():
            theirs = answer_rows(*answer_logits(model, collate(twins, pad, device)))[0]
        found.append(divergence(rows, teacher_logits(theirs, twins, targets)).double())
    return float(torch.cat(found).mean())
