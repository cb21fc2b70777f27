"""LongReach: pretrain hybrid language models on sequences that outgrow one device."""

__version__ = "0.1.0"
