"""Finished models in, one model directory out: WiSE-FT, task arithmetic, TIES.

settings.py      what a person asks for
methods.py       the arithmetic, one tensor at a time
weights.py       tensors of a model on the disk: read by name, written in the layout of the initial model
checks.py        which models belong together
card.py          the model card of the result
merge_models.py  `anneal merge`: from models to a model directory

Importing this package loads nothing heavy.
"""
