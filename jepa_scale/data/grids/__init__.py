"""Grids of colours: finding objects, generating sequences by rules, and augmenting samples."""
