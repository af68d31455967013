"""Helpers of the test suites and of the demo: tiny checkpoints, a real ComfyUI, leak checks."""
