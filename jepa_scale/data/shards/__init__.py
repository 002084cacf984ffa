"""Prepared shards: their format, where they are, how samples are read from them."""
