"""The errors a user can cause. Each message is one sentence that names the record, file or argument and the remedy."""

from __future__ import annotations


class ClueError(Exception):
    """Base of every error CLUE raises on purpose; the command line prints its text and exits with status 2."""


class RecordError(ClueError):
    """A record, or the file it is in, cannot be used; the message names file and line."""


class OverlapError(ClueError):
    """Two sets that must be disjoint (forget and retain, localize and evaluate) share records."""


class ModelError(ClueError):
    """The model or its tokenizer cannot be used: unknown family, NaN weights, a missing pad token, a short context."""


class AttributionError(ClueError):
    """Scores cannot be trusted: misaligned pairs or a conservation gap above the tolerance."""


class CircuitError(ClueError):
    """A circuit is malformed: a cycle, an unknown node id, an output that nothing reaches."""


class FormulaError(ClueError):
    """A formula file is malformed, cut short, or its header lies; the message names file and line."""


class CertificateError(ClueError):
    """A certificate file is none, of another version, or of another question."""


class RefutedError(CertificateError):
    """A certificate does not prove what it claims; the message says where it fails."""


class PlanError(ClueError):
    """A plan does not fit the model, or its file is damaged."""


class DeltaError(ClueError):
    """A delta does not fit the model, was applied already, or its file is damaged or cannot be written."""


class RunError(ClueError):
    """A run directory is missing a stage, or already holds another run."""
