#!/usr/bin/env bash
# Token teacher in, byte model out: the whole curriculum (1a, 1b, 1c, 2a, 2b).
#
#   torchrun examples/pretrain_byte_kd.sh [flags]                       torchrun runs this file with Python
#   torchrun --nproc-per-node 8 examples/pretrain_byte_kd.sh [flags]
#   bash examples/pretrain_byte_kd.sh [flags]                           GPUS=8 for more ranks
#
# Valid bash and valid Python. What stands between the triple quotes is a string for Python; bash executes it, never
# comes back, and takes the rest for a here-document.
""":"
exec python3 -m torch.distributed.run --nproc-per-node "${GPUS:-1}" "$0" "$@"
: <<'# the end of Python'
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# processes that multiprocessing starts import this file again: only the guard keeps them from training
if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from megabyte_distill.pretrain.main import main

    raise SystemExit(main(sys.argv[1:], example_folder=ROOT / "examples" / "tiny", example_run=Path("runs/tiny")))
# the end of Python
