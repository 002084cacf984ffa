"""Generators of synthetic tasks: each writes ``train.jsonl`` and ``test.jsonl``, determined by a seed and its options."""
