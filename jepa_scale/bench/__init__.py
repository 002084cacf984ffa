"""The bench: objectives on tasks where latent prediction should help, each beside its baseline and its detached control."""
