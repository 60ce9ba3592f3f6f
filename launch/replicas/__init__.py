"""Data parallelism: several tensor-parallel groups behind one executor, run by Ray Serve."""
