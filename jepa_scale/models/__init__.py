"""The decoder backbone: the native decoder, or any causal language model of transformers."""
