"""Runs diffusion transformers on a background process group, split by tensor parallelism.

Empty on purpose: each process imports only its own rooms. ``ARCHITECTURE.md`` shows which.
"""
