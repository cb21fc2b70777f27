"""Token-local math: embeddings, norms, rotary positions, gated activations, and the loss."""

from .cross_entropy import chunk_tokens, cross_entropy, loss_and_correct
from .depth_attention import depth_attention
from .doubly_stochastic import doubly_stochastic
from .embedding import embedding
from .gated_norm import gated_norm
from .heads import add_skip, scale_heads
from .rms_norm import l2_norm, rms_norm
from .rope import ROPE_SCALINGS, RopeScaling, Rotation, rope, rope_frequencies, rotate, rotations
from .swiglu import clamped_swiglu, swiglu
from .tiles import tiled

__all__ = [
    "ROPE_SCALINGS",
    "RopeScaling",
    "Rotation",
    "add_skip",
    "chunk_tokens",
    "clamped_swiglu",
    "cross_entropy",
    "depth_attention",
    "doubly_stochastic",
    "embedding",
    "gated_norm",
    "l2_norm",
    "loss_and_correct",
    "rms_norm",
    "rope",
    "rope_frequencies",
    "rotate",
    "rotations",
    "scale_heads",
    "swiglu",
    "tiled",
]
