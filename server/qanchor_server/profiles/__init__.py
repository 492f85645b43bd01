"""Where users' profiles live: a durable store and the prepared prefixes made from it."""
