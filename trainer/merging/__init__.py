"""Finished models in, one model directory out: WiSE-FT, task arithmetic, TIES.

methods.py        what a person asks for, and the arithmetic, one tensor at a time
weights.py        which stored tensor of a tuned model is which of the initial one
merge_models.py   `anneal merge`: from models to a model directory

Importing this package loads nothing heavy.
"""
