"""Raw records to validated profiles, rendered event texts, prefix layouts and training triples.

`profile`, `render` and `prefix` are torch-free and shared with the server.
"""
