"""The objective ``grid``."""
