"""Tuned models and general text in, what of their loss was hidden and what is gone out: `anneal restore`.

config.py    what a person asks for
text.py      the restoring text: the rows that the initial model finds easiest, up to a number of tokens
shares.py    lost, gone, hidden: the arithmetic
report.py    the table, its verdicts and restore.json
restore.py   all of it in order
"""
