"""What the ops share: checks and launches of Triton kernels, and the C++ build."""
