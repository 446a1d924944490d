"""Kernels that ship with the library, one folder each, publishable to the Hub as they stand."""
