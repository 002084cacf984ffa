"""Facts and their reverses."""
