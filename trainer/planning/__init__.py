"""Planning: what a run would take on a cluster, in memory, bytes and time, from what modules and ops state."""
