"""What tests of exact numbers run under, as in tests/circuit."""

from tests.circuit.conftest import in_double  # noqa: F401
