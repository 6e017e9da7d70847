"""torchrun for several GPUs or machines, but a failure ends in the line of the process that failed, not in a traceback.

    python local/launch.py --nproc_per_node 2 --master_port 29500 local/train.py --stage_conf ...   # torchrun's options
"""

import signal
import sys

import torch.distributed.run as torchrun
from torch.distributed import DistError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from common import UserError, first_line, run


def main() -> None:
    try:
        torchrun.main()
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)  # it has said why
        name = signal.Signals(-failure.exitcode).name
        short = ", as the system does when memory is short" if name == "SIGKILL" else ""
        raise UserError(f"process {rank} was ended by {name}{short}; the same command goes on") from error
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except DistError as error:
        reason = first_line(error).rstrip(".")
        raise UserError(f"the processes do not meet: {reason}; start every machine, with machine 0's MASTER_ADDR and a "
                        "MASTER_PORT that no other training there has") from error  # fmt: skip


if __name__ == "__main__":
    run(main)
