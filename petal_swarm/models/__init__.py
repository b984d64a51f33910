"""Lean blocks, the ends of a model, and checkpoints. No network but the Hugging Face Hub; no asyncio."""
