"""Processes of one job: how they find each other, and what they send."""
