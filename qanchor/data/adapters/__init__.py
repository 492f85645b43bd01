"""One module per public data set: its own files in, a data set directory out."""
