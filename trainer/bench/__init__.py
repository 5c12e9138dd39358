"""Finished models and tasks in, scores tied to the weights out: `anneal bench`, through lm-evaluation-harness."""
