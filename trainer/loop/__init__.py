"""Batches in, optimizer steps out: the Trainer, the proof before the first step, what a user sees meanwhile."""
