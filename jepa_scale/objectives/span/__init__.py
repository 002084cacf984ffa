"""The objective ``span``."""
