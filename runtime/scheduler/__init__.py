"""The scheduler: continuous batching, KV pages, prefix cache. Imports no torch."""
