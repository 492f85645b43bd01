"""Joint pre-training of both towers on UserU triples."""
