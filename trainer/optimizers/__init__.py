"""Optimizers: which rule steps which parameter, and the rules that torch and DeepSpeed lack under ZeRO."""
