"""Prepared shards: their format, their location (local or by URL), and reading samples from them."""
