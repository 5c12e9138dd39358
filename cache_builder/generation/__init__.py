"""Prompts and sampling settings in, rows that the frozen model wrote itself out."""
