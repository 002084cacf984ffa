"""Tensor parallelism of a decoder: the plan of its layers, and the layers that communicate."""
