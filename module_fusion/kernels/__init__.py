"""The built-in kernels, one self-contained folder each."""
