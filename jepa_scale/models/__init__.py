"""The decoder backbone: our own, or any causal language model of transformers."""
