"""What compiled kernels of a CPU are made of: vectors of 16 fp32 values, memory, threads and compiling."""
