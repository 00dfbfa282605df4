"""Faults put into a run on purpose, and how the run handles them.

Each module holds faults of one kind. A fault is a function that takes how often to try and
returns a Tally. tests/test_faults.py tries each a few times; ``make faults`` many times.
"""
