"""The order of samples, and their grouping into batches."""
