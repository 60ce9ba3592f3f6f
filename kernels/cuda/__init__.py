"""The CUDA implementations of the ops: one module per subject, kernels compiled by NVRTC on first use."""
