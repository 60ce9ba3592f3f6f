"""`lockstep bench`: latency, throughput, serve and comm."""
