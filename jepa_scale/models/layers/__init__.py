"""Layers of the native decoder."""
