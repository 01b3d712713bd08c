"""One fixed default configuration per kernel, size class and architecture: data, and the functions that choose.

Nothing is tuned at run time. The blocks are named by dimension (BLOCK_T, BLOCK_N, BLOCK_R, …). `mumoe static` compiles
every entry for every architecture and shows its registers, shared memory and occupancy; `mumoe tune` looks for better
ones on a GPU.
"""

from mumoe_fast.kernels.configs._base import FEW_TOKENS, Config, architecture, target_architecture
from mumoe_fast.kernels.configs.bilinear import bilinear_config, core_gradient_config, few_tokens_config
from mumoe_fast.kernels.configs.contraction import (
    Crossover,
    From,
    activation_backward_config,
    cp_backward_config,
    cp_forward_config,
    tr_backward_config,
    tr_forward_config,
    vendor_contracts,
)
from mumoe_fast.kernels.configs.gate import gate_backward_config, gate_forward_config
from mumoe_fast.kernels.configs.rows import columns_config, entmax_rows_config, merge_config
from mumoe_fast.kernels.configs.support import gather_config, product_backward_config, segment_config

__all__ = [
    "FEW_TOKENS",
    "Config",
    "Crossover",
    "From",
    "activation_backward_config",
    "architecture",
    "bilinear_config",
    "columns_config",
    "core_gradient_config",
    "cp_backward_config",
    "cp_forward_config",
    "entmax_rows_config",
    "few_tokens_config",
    "gate_backward_config",
    "gate_forward_config",
    "gather_config",
    "merge_config",
    "product_backward_config",
    "segment_config",
    "target_architecture",
    "tr_backward_config",
    "tr_forward_config",
    "vendor_contracts",
]
