"""`anneal cache inspect`: an open cache in, its statistics, one row or a picture out."""
