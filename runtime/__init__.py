"""One rank: configuration, scheduler, cache, model and sampler. Imports comm and kernels."""
