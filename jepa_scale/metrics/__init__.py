"""Metrics: pure functions of states, texts and queries."""
