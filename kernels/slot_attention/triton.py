"""Slot attention by the Triton kernels of gated linear attention: the passes of `chunked`, whose problems say so."""

from .chunked import attend as attend
from .chunked import backward as backward
from .chunked import final_state as final_state
from .chunked import forward as forward
from .chunked import summarize_backward as summarize_backward
