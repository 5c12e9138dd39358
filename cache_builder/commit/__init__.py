"""Staged rows and their logprobs in, durable shards out: plan, claim, capture, commit, finish; many workers at once."""
