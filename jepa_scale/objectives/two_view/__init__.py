"""The objective ``two_view``."""
