"""Runs to Hugging Face format and back: a tensor at a time, without a GPU and without a process group."""
