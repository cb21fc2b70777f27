"""Streams: which tokens of which documents each row holds. Numbers alone; token ids are read by `packing`."""
