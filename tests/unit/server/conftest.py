"""Makes the fake bundle of the integration tests importable here too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "integration" / "server"))
