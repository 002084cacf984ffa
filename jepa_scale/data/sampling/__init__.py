"""Which samples come when, and how they become batches."""
