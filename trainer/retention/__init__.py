"""Gradients and weights of a step in, the same held to the initial weights out: beside or instead of KL.

settings.py   what a person writes: `l2`, `ewc`, `sfa`
anchor.py     theta0: the initial weights, placed like the parameters
method.py     the interface: before the first step, with the gradients, after a step
l2.py         L2 towards the initial weights
ewc.py        elastic weight consolidation; fisher.py estimates, fisher_file.py keeps its Fisher information
ewc_tasks.py  the same for several earlier tasks with models of their own
sfa.py        sequential fine-tuning with averaging
retained.py   all methods of one run, as the Trainer calls them

Importing this package loads nothing heavy.
"""
