"""A base and what varies in, ordinary run directories, merges and one table out: `anneal sweep`.

config.py    what a person asks for, as one YAML file or as options
plan.py      the runs that this comes to: settings and names
names.py     short names of runs, safe as directory names
worker.py    one run in a process of its own
pools.py     several such processes: one after another, or in parallel
on_ray.py    the same on a Ray cluster
runs.py      which runs are finished, which failed, and the rest through a pool
merges.py    merges of finished runs
search.py    the largest kl_coef that keeps a share of direct fine-tuning's gain
compared.py  how the models are compared
report.py    the table and sweep.json
sweep.py     all of it in order
"""
