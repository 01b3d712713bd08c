"""The operators `torch.ops.mumoe.*`: schema, fake, autograd and FLOP formula, one file per family.

Opaque to the compiler, functional (no argument is ever written to), and free of validation: `mumoe_fast.functional` is
the public door. The `impl` argument names the implementation that runs; the reference is never an operator.
"""

from mumoe_fast.ops import batch_norm, cp, entmax, full, gate, mxd, tensor_ring, tucker

__all__ = ["batch_norm", "cp", "entmax", "full", "gate", "mxd", "tensor_ring", "tucker"]
