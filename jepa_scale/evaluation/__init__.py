"""Evaluation: one file a metric family."""
