"""One module per suite; each has `run(bench) -> Findings`."""
