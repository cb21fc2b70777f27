"""Masks: which keys a query sees; one small file per pattern, and what is derived from any of them."""

from .block_local import BlockLocal as BlockLocal
from .dilated import Dilated as Dilated
from .mask import Mask as Mask
from .pattern import Band as Band
from .pattern import Bands as Bands
from .pattern import Pattern as Pattern
from .pattern import Pieces as Pieces
from .pattern import Tile as Tile
