"""A corpus and a model in, a commented settings file with the commands that use it out."""
