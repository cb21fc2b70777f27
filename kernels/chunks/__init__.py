"""What chunked linear ops share: slabs of chunks, decays within them, sweeps over them, and Triton's tiles."""
