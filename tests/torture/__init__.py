"""Long adversarial runs: `make torture`, or `python -m tests.torture`. Their short forms are in tests/test_torture.py.

A fault is a function of a folder, a random generator and a number of trials; it returns a `Tally`. Who adds one puts it
into `FAULTS` of `tests.torture.__main__`.
"""
