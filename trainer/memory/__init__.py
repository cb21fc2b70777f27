"""What a step holds in memory: counted from the model alone, by part."""
