"""What benchmarks/gpu.py is made of: pieces of work, a budget, an archive, a cache of kernels."""
