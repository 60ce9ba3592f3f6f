"""Sampling: the sampler, log-probabilities, grammars for structured outputs."""
