"""The numbers of metrics.jsonl as TensorBoard scalars, for people who watch a run.

Written with tensorboardX, which needs nothing else of TensorFlow; any `tensorboard --logdir RUN`
shows them.
"""

from pathlib import Path
from typing import Any


class Scalars:
    """Writes event files into a directory; a resumed run hides what it takes again."""

    def __init__(self, directory: Path, first_step: int) -> None:
        """`first_step`: the next step to be written; later ones already there are hidden."""
        from tensorboardX import SummaryWriter

        # The name holds whole seconds: without a suffix a quick restart would overwrite it.
        self._writer: Any = SummaryWriter(
            str(directory), purge_step=first_step, filename_suffix=f".{first_step}"
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Add a step's numbers: `heldout_x` as heldout/x, the others as train/x."""
        for name, value in metrics.items():
            group, _, rest = name.partition("heldout_")
            self._writer.add_scalar(f"heldout/{rest}" if rest else f"train/{group}", value, step)

    def close(self) -> None:
        """Write out what is held back."""
        self._writer.close()
