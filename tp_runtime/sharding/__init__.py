"""Sharding: what a plan says (``plan``), which slices a rank reads (``parts``), and the walker
that puts vLLM's layers in place of a model's linears (``walker``, the only one to import vLLM).
"""
