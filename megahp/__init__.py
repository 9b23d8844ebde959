"""megahp: a distributed pretraining stack that sets its own hyperparameters."""

__version__ = "0.1.0"
