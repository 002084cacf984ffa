"""The objective ``mtp``."""
