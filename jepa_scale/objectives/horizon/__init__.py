"""The objective ``horizon``."""
