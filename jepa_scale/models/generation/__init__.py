"""Generation of tokens: greedy in batches, and one prompt at a time with drafts."""
