"""The lines that FunASR's trainer logs, read back.

    rows = read_log("exp_output/exp/8k_telephone/stage1_encoder_adapt/train.log")
    curve = [(row["total_step"], row["loss"]) for row in rows if row["tag"] == "train"]
"""

import os
import re
from pathlib import Path
from typing import Any

# As funasr/train_utils/trainer_ds.py, log(), writes them (1.4.16); the first process speaks for all.
LINE = re.compile(
    r"\b(?P<tag>train|val), rank: 0, epoch: (?P<epoch>\d+)/(?P<epochs>\d+)"
    r".*?step_in_slice: (?P<step>\d+)/(?P<steps>\d+).*?total step: (?P<total_step>\d+)"
    r".*?\(loss_avg_slice: (?P<loss>[^)]+)\).*?\(acc_avg_slice: (?P<acc>[^)]+)\)"
    r".*?'total_time': '(?P<seconds>[^']+)'.*?peak: (?P<gpu>[\d.]+) GB"
)
WHOLE = ("epoch", "epochs", "step", "steps", "total_step")


def read_log(path: str | os.PathLike) -> list[dict[str, Any]]:
    """The logged steps in their order; none where the file is not there. A line that was cut off is left out.

    Each has `tag` ("train" or "val"), `epoch` (from 0; after an epoch's validation the number of epochs done),
    `epochs`, `step` of `steps` in the epoch, `total_step`, `loss` and `acc` (means of the epoch so far), `seconds` of
    the step, and `gpu` (most memory in use so far, GiB; 0 on a CPU). What a killed run did after its last checkpoint
    is there twice.
    """
    text = Path(path).read_text("utf-8", errors="replace") if os.path.isfile(path) else ""
    return [
        {name: value if name == "tag" else int(value) if name in WHOLE else float(value)
         for name, value in match.groupdict().items()}
        for match in LINE.finditer(text)
    ]  # fmt: skip
