"""Commands of `anneal`: typed options in, printed results out. `cli.py` says what each is called.

terminal.py        printing, names: what all commands share
completion.py      what the shell offers at a press of the tab key
options.py         options and arguments that several commands have
parsing.py         what was typed as text, as values
cache_process.py   builds the caches that a command needs on its way, each in a process of its own
cache_build.py     anneal cache build, estimate
cache_tools.py     anneal cache inspect, verify, merge, export, convert, push, pull
train.py           anneal train
merge.py           anneal merge
evaluate.py        anneal eval
compare.py         anneal compare, select
bench.py           anneal bench
sweep.py           anneal sweep
chain.py           anneal chain
restore.py         anneal restore
probe.py           anneal probe noise, answers, memory, tune
"""
