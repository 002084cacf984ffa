"""Formats of raw data, one module per format; each reads files as records."""
