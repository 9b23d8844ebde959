"""The commands of `megahp`, one module each (benchmark norm: benchmark_norm.py), with their lines in `megahp --help`.

A module has add_arguments(parser) and run(options, words), which returns the exit code; words is the whole command
line. Only the module of the command in use is imported, so that `megahp preprocess` never imports torch.
"""

COMMANDS = {
    "preprocess": "tokenize text into .bin and .idx",
    "merge": "merge tokenized data of one tokenizer",
    "recipe": "write a run file from a size, a budget or a loss, with the source of every number",
    "config": "print every setting and where its value comes from",
    "train": "train the run of a TOML file",
    "sample": "generate text from a run's newest checkpoint",
    "forecast": "forecast series by a run that was trained on series",
    "evaluate": "measure loss, bits per byte and perplexity of text files",
    "evaluate-tasks": "run lm-evaluation-harness on your own tasks",
    "report": "write report.html of one run, or of several overlaid",
    "replay": "repeat a run's batch decisions from its log, and compare",
    "fit": "fit scaling laws to finished runs",
    "checkpoint": "list, verify, compare or delete checkpoints",
    "convert": "convert a model between megahp, Hugging Face and Megatron",
    "extend-vocabulary": "add rows to a model for the tokens that a new tokenizer adds",
    "plan": "find a run's best layout on a cluster, its memory, time, and end",
    "launch": "check a run, and submit it to Slurm",
    "runs": "list all runs in a folder",
    "status": "show the state of runs: jobs, progress, ETA, last events",
    "check-cluster": "find bad nodes before a run does",
    "verify-layout": "check that a run's layout trains the same model as one rank",
    "coordinate-check": "check that activations keep their size as the model grows",
    "transfer-sweep": "check that the best learning rate stays the same as the model grows",
    "mix": "search the data weights that small proxy runs learn most from",
    "population": "change settings as a population of runs trains: the worst continue from the best",
    "measure noise-scale": "measure the gradient noise scale at a run's checkpoints, exactly, by kind of layer",
    "measure critical-batch": "measure the critical batch at a checkpoint, by branched training",
    "benchmark norm": "compare the norm ops with torch's and others' kernels",
    "benchmark loss": "compare the loss in slices of the vocabulary with whole logits",
    "benchmark training": "compare tokens per second of training with a plain PyTorch baseline",
    "benchmark checkpoint": "time saving and loading",
    "benchmark communication": "time collectives over a run's groups of ranks",
    "benchmark scaling": "measure weak and strong scaling of training",
    "benchmark time-to-loss": "compare how long settings train until they reach a loss",
}
HIDDEN = ("requeue", "segment")  # called by the scripts of slurm/
RESTARTED = ("train", "verify-layout", *HIDDEN)  # a failing file system is a fault here, which a restart may cure
LISTING = "\n".join(f"  {name:<26}{about}" for name, about in COMMANDS.items())
