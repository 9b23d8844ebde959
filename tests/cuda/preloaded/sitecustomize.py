"""Python imports this first where its folder is on PYTHONPATH: CUDA on the host for a process and its children."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import cuda_on_host

cuda_on_host.start()
