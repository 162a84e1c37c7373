"""What the ops share: which Triton kernels may run where, launches, and the C build."""
