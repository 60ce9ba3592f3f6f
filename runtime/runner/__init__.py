"""One rank executes step plans: slot tables, model runner, CUDA graphs, profiler."""
