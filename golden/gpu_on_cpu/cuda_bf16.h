// Stands in for CUDA's header, which kernels include: run.cpp has what they use of it.
