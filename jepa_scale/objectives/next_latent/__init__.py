"""The objective ``next_latent``."""
