"""Commands of `anneal` that have a module of their own: typed options in, printed results out.

terminal.py        printing, names, progress: what all commands share
completion.py      what the shell offers at a press of the tab key
chain.py           anneal chain
restore.py         anneal restore
probe.py           anneal probe noise, answers, memory, tune
cache_process.py   builds the caches that a command needs on its way, each in a process of its own
"""
