"""Objectives: one file each, views and module together."""
