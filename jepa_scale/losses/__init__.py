"""Loss functions without state."""
