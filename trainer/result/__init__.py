"""A trained model in, a model directory with card and record out."""
