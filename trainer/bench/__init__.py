"""Finished models and tasks in; scores per task and per item, tied to the weights, out (lm-evaluation-harness)."""
