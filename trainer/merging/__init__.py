"""Finished models in, one model directory out: WiSE-FT, task arithmetic, TIES, soups, Fisher merging.

settings.py       what a person asks for
methods.py        the arithmetic, one tensor at a time
trim.py           TIES over a whole model: which entries of a task vector stay
soup.py           greedy soups: which models go in
fisher.py         Fisher merging: F of every model, estimated or kept
models.py         the models, checked to belong together, read and written tensor by tensor
weights.py        which stored tensor of a tuned model is which of the initial one
merge_models.py   `anneal merge`: from models to a model directory

Importing this package loads nothing heavy.
"""
