"""Best-fit packing, written in C++ (csrc/packing); here are its test and its benchmark."""

from r1mega_kernels._C import pack_best_fit

__all__ = ["pack_best_fit"]
