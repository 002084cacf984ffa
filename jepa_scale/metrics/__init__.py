"""Metrics: functions without state of representations, texts and queries."""
