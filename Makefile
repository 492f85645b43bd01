# Each target does everything it needs from a fresh clone; see scripts/ for the actions.
.PHONY: setup demo test check bench protos clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt scripts/setup
	bash scripts/setup

demo: setup
	bash scripts/demo

test: setup
	bash scripts/test

check: setup
	bash scripts/check

bench: setup
	bash scripts/bench

protos: setup
	bash scripts/protos

clean:
	rm -rf .venv build dist demo_output .mypy_cache .ruff_cache .pytest_cache
