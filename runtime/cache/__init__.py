"""Prefix cache and KV memory: which tokens are cached, in which pages, and where those pages lie."""
