"""FLOPs of four hybrids by closed formulas, written out layer by layer, are those of the meters."""

import pytest
from model_presets import build_model

from longreach.kernels.documents import Documents

VOCABULARY, LENGTH, ROWS = 61, 1024, 2
LENGTHS = [[700, 300], [1000]]  # both rows end in padding
DOCUMENTS = [700, 300, 1000]
PLACES = ROWS * LENGTH  # linear layers and recurrences run on padding too
PAIRS = sum(n * (n + 1) // 2 for n in DOCUMENTS)  # (query, key) pairs of causal attention
POSITIONS = [p for n in DOCUMENTS for p in range(n)]


def matrices(*shapes):
    """A product and a sum per weight and place."""
    return 2 * PLACES * sum(inputs * outputs for inputs, outputs in shapes)


def swiglu(width, hidden):
    return matrices((width, hidden), (width, hidden), (hidden, width))


def softmax(width, heads, kv_heads):
    dim = width // heads
    projections = matrices((width, width), (width, kv_heads * dim), (width, kv_heads * dim), (width, width))
    return projections + PAIRS * heads * (2 * dim + 2 * dim)  # q k^T, then the weighted sum of values


def lightning(width, heads, chunk=64):
    """Per token and head: a state of K x V is written and read; within a chunk scores C K, and values C V."""
    dim = width // heads
    return matrices(*[(width, width)] * 5) + PLACES * heads * (2 * dim * dim + 2 * dim * dim + 2 * chunk * (dim + dim))


def gated_deltanet(width, heads, key_heads, chunk=32):
    """Per token and head: the state is read, erased and written; in a chunk two scores C K, a solve, and values C V."""
    dim = width // heads
    keys = key_heads * dim
    projections = matrices(
        (width, keys), (width, keys), (width, width), (width, heads), (width, heads), (width, width), (width, width)
    )  # q, k, v, beta, decay, gate, output
    in_chunk = 2 * chunk * dim + 2 * chunk * dim + chunk * dim + 2 * chunk * dim
    return projections + PLACES * heads * (3 * 2 * dim * dim + in_chunk)


def native_sparse_attention(width, heads, kv_heads, window, stride, hidden, block, count, near):
    dim, branches = width // heads, 3
    keys = branches * kv_heads * dim
    projections = matrices((width, width), (width, keys), (width, keys), (width, branches * heads), (width, width))
    windows = ROWS * -(-LENGTH // stride) * kv_heads  # that the two compressions make a key or a value of
    compressions = 2 * 2 * windows * (window * dim * hidden + hidden * dim)
    seen = sum(max(0, (p + 1 - window) // stride + 1) for p in POSITIONS)
    listed = block * sum(min(count, p // block + 1) for p in POSITIONS)
    close = sum(min(near, p + 1) for p in POSITIONS)
    attention = (seen + listed + close) * heads * (2 * dim + 2 * dim)
    selection = seen * heads * 2 * dim  # scores once more, whose normaliser is known
    return projections + compressions + attention + selection


def mamba(width, states, rank):
    """Seven operations per token, channel and state; convolutions are not counted."""
    projections = matrices((width, width), (width, width), (width, rank + 2 * states), (rank, width), (width, width))
    return projections + 7 * PLACES * width * states


HEAD = {width: matrices((width, VOCABULARY)) for width in (192, 256)}
FLOPS = {
    "minimax_01_tiny": 7 * lightning(192, 6) + softmax(192, 6, 2) + 8 * swiglu(192, 512) + HEAD[192],
    "gated_deltanet_hybrid_tiny": (
        6 * gated_deltanet(192, 6, 3) + 2 * softmax(192, 6, 2) + 8 * swiglu(192, 512) + HEAD[192]
    ),
    "nsa_tiny": 4 * (native_sparse_attention(256, 8, 2, 16, 8, 64, 32, 6, 128) + swiglu(256, 512)) + HEAD[256],
    "jamba_tiny": 7 * mamba(192, 8, 12) + softmax(192, 6, 2) + 8 * swiglu(192, 512) + HEAD[192],
}


@pytest.mark.parametrize("preset", FLOPS)
def test_flops_by_hand_are_those_of_the_meter(preset):
    documents = Documents.from_lengths(LENGTHS, LENGTH)
    assert build_model(preset, vocabulary=VOCABULARY).flops(documents) == FLOPS[preset]
