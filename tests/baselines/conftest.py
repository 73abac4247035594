"""The unlearning tests' small sets and tokenizer, for models of any family."""

from tests.unlearn.conftest import sets, tokenizer

__all__ = ["sets", "tokenizer"]
