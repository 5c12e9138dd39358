"""Files or a data set in, checked examples of four kinds out."""
