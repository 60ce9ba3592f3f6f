"""From logits to tokens: the sampler, log-probabilities, grammars for structured outputs."""
