"""Tasks learnt one after another in, ordinary run directories and a retention matrix out: `anneal chain`.

config.py    what a person asks for, as one YAML file or as options
caches.py    which caches the chain needs, and who builds those that are corpora
plan.py      the runs of the chain and of its controls: settings, names, where each starts
matrix.py    how good every stage is on every task, and what follows: forgetting, transfer, ...
readings.py  evaluations, remembered
report.py    tables for people and matrix.json
heat_map.py  the same as a picture
chain.py     all of it in order
releases.py  the matrix alone, of finished models of any origin
"""
