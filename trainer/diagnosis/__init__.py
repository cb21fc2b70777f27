"""Diagnosis: whether a model under a topology computes what it computes on one device; `launch/doctor.py` prints it.

`model.py` makes the model small, `cases.py` the rows that it is tried on. `truth.py` computes on one process what must
come out, by the kernels' references alone. `ranks.py` starts ranks, `work.py` is what they do, `checks.py` compares,
and `diagnose.py` goes through all checks for a `report.py`.
"""
