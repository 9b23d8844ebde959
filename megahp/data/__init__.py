"""From text to batches: texts, tokenizer, .bin/.idx files, sample order, blend, loader; n-gram baselines.

Import the modules by name: this package imports none of them, so that the tools that write data never load PyTorch.
"""
