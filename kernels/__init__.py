"""The ops of a decoder step: contracts, definitions in plain torch, and CUDA kernels. Imports no other room."""
