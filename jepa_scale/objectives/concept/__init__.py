"""The objective ``concept``."""
