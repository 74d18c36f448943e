"""What other libraries write themselves and fastseq has kernels for."""
