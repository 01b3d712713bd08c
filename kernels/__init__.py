"""Triton kernels, one operator per file: tensors in, tensors out; no autograd, no nn, no validation.

Importing this package needs no Triton; importing one of its modules does.
"""
