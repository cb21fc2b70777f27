"""Diagnosis: whether a model under a topology computes what it computes on one device; `launch/doctor.py` prints it.

`model.py` makes the model small, `cases.py` the rows that it is tried on, `variants.py` more calls of its ops.
`truth.py` computes on one process what must come out, by `definitions.py`, `selections.py` and the references of
recurrences; `choices.py` notes which experts and blocks were chosen. `ranks.py` starts ranks, `work.py` and
`training.py` are what they do. In `checks/`, `exact.py`, `inexact.py` and `loop.py` compare by `comparison.py` and
`ties.py`, and `diagnose.py` goes through all of it for a `report.py`.
"""
