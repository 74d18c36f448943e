"""CUDA kernels without a GPU: run on the host by an emulation, compiled by nvcc and looked at."""
