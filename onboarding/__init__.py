"""The first minutes: an installation looked at, settings written for a corpus and a model.

Importing this package loads nothing heavy.
"""
