"""Encoders, which turn records into samples, and their tokenizers."""
