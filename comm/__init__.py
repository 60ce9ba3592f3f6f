"""Collectives between the ranks of one tensor-parallel group. Imports kernels."""
