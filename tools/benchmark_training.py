"""`megahp benchmark training`, for those who call it by path."""

from megahp.__main__ import run

if __name__ == "__main__":
    run("benchmark", "training")
