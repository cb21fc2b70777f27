"""What chunked ops with a state share: slabs of chunks, decays within them, sweeps over them, and Triton's tiles."""
