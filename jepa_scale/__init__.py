"""jepa_scale: a distributed trainer for JEPA-augmented decoder language models."""

__version__ = "0.1.0"
