"""Evaluation: every measure against a slow, obvious way of computing it."""
