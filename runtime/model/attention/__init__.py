"""Attention backends: torch, FlashInfer with our decode kernel, batch-invariant."""
