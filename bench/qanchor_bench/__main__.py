"""`python -m qanchor_bench` is `qanchor-bench`."""

import sys

from qanchor_bench.cli import main

if __name__ == "__main__":
    sys.exit(main())
