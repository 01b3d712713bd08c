"""What must be set before CUDA starts."""

import os

# Several streams at once: cuBLAS then promises the same bits only with workspaces of a fixed size.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
