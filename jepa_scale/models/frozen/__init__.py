"""The frozen weights under the adapters of a LoRA run: where they come from, and how they are held in 4 bits."""
