"""Where kernels run: kernel objects, the public layer, tracing, programs, and one folder per backend."""
