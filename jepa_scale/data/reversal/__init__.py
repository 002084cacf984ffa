"""Facts and their reverses: generation, files, and the data source."""
