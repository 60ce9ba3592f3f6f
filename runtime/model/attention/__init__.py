"""Attention layers and their backends: torch, FlashInfer with own decode kernel, batch-invariant."""
