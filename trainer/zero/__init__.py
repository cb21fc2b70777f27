"""ZeRO where DeepSpeed is not enough: states in the parts that ranks hold, two types, experts that ranks share out."""
