"""Attention layers and their backends: torch, FlashInfer with our decode kernel, batch-invariant."""
