"""Attention within the segments of a packed sequence."""
