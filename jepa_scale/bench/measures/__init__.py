"""Measurements of trained runs that an evaluation split's loss does not show, one module a task."""
