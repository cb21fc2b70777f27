"""Conversion: the weights of softmax attention as those of another mechanism, and how exact that is.

`softmax` has fewer key/value heads and latents; `sparse` has what reads selected blocks.
"""

from .converted import Converted as Converted
from .softmax import grouped as grouped
from .softmax import latent as latent
from .sparse import block_sparse as block_sparse
from .sparse import native_sparse as native_sparse
