"""Audit: a file of what each step of a run has read, and the proof from it that nothing was repeated or left out."""
