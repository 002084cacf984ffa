"""What differs between the families of transformers, and how it is found out."""
