"""Tasks of long contexts: problems of any length with known answers, each drawn from a seed and a number alone."""
