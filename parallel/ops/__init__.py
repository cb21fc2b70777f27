"""What mixers import: every op that mixes tokens, on a sequence that ranks share.

Each has the signature of its kernel plus `seq`, and a `slot` that names its state within a layer: two calls in one
layer need two slots. With a decoding `seq` the same call continues from the cache that `seq` carries and updates it.
"""

from .attention import attention, keep_keys, kernel_attention, latent_attention, softmax_attention
from .convolution import short_conv, token_shift
from .index import gate_divergence, index_divergence
from .recurrent import (
    delta_rule,
    diagonal_scan,
    diagonal_ssm,
    gated_linear_attention,
    log_linear_attention,
    mesa,
    recurrent,
    selective_scan,
    slot_attention,
    slstm,
    wkv,
)
from .sparse import (
    block_sparse_attention,
    compressed_attention,
    gather_windows,
    listed_latent_attention,
    local_windows,
    select_blocks,
    window_means,
    windows_held,
)

__all__ = [
    "attention",
    "block_sparse_attention",
    "compressed_attention",
    "delta_rule",
    "diagonal_scan",
    "diagonal_ssm",
    "gate_divergence",
    "gated_linear_attention",
    "gather_windows",
    "index_divergence",
    "keep_keys",
    "kernel_attention",
    "latent_attention",
    "listed_latent_attention",
    "local_windows",
    "log_linear_attention",
    "mesa",
    "recurrent",
    "select_blocks",
    "selective_scan",
    "short_conv",
    "slot_attention",
    "slstm",
    "softmax_attention",
    "token_shift",
    "window_means",
    "windows_held",
    "wkv",
]
