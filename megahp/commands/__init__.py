"""Every command of `megahp`, a file each (benchmark norm: benchmark_norm.py), and its line in `megahp --help`.

A file has add_arguments(parser) and run(options, words), which returns the exit code; words are the command line's.
Only the file of the command that is called is imported, so that `megahp preprocess` never imports torch.
"""

COMMANDS = {
    "preprocess": "text into tokenized documents, .bin and .idx",
    "recipe": "from a size, a budget or a loss to a run file, with every source",
    "config": "print every setting and where its value comes from",
    "train": "train the run of a TOML file",
    "sample": "generate text from a run's newest checkpoint",
    "evaluate": "loss, bits per byte and perplexity of text files",
    "evaluate-tasks": "lm-evaluation-harness on your own tasks",
    "report": "write report.html of one run, or of several overlaid",
    "replay": "decide a run's batch changes again from its log, and compare",
    "fit": "fit scaling laws to finished runs",
    "checkpoint": "list, verify, compare or drop checkpoints",
    "convert": "a model between megahp, Hugging Face and Megatron",
    "extend-vocabulary": "a model with rows for the tokens that a new tokenizer adds",
    "plan": "what a run's ranks will compute, send and allocate, before it is queued",
    "launch": "check a run, and submit it to Slurm with a script of slurm/",
    "runs": "all runs below a folder, a line each",
    "status": "how runs stand, or how they ended: jobs, progress, ETA, last events",
    "check-cluster": "find nodes that are unfit before a run does",
    "verify-layout": "check that a run's layout trains the same model as one rank",
    "coordinate-check": "do activations stay as large while the model grows?",
    "transfer-sweep": "does the best learning rate stay where it is while the model grows?",
    "measure noise-scale": "the gradient noise scale at a run's checkpoints, exactly, by kind of layer",
    "measure critical-batch": "the critical batch at a checkpoint, by branched training",
    "benchmark norm": "the norm ops against torch's and others' kernels",
    "benchmark loss": "the loss in slices of the vocabulary against whole logits",
    "benchmark training": "tokens per second of a training step beside a plain PyTorch baseline",
    "benchmark checkpoint": "what saving and loading take",
    "benchmark communication": "collectives over the groups of ranks a run has",
    "benchmark scaling": "weak and strong scaling of real training",
}
HIDDEN = ("requeue", "segment")  # what the scripts of slurm/ ask
STARTED_AGAIN = ("train", "verify-layout", *HIDDEN)  # where a file system that fails is a fault, not a mistake
LISTING = "\n".join(f"  {name:<26}{about}" for name, about in COMMANDS.items())
