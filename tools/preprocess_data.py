"""`megahp preprocess`, for those who call it by path."""

import sys

from megahp.__main__ import run

if __name__ == "__main__":
    sys.argv[1:1] = ["preprocess"]
    run()
