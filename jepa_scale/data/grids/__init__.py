"""Grids of colours: their objects, their rules, their changes."""
