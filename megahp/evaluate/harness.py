"""Adapt a trained run to the model interface of EleutherAI's lm-evaluation-harness (0.4.13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from megahp.config import longest
from megahp.errors import UserError
from megahp.evaluate.perplexity import document_windows, scores, windows
from megahp.evaluate.sample import TrainedModel, continuation

GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k"}


class Harness(TemplateLM):
    """A trained run as a model of the harness.

    The harness's own rule splits a text into tokens of context and continuation; a text without context comes after
    what was there in training. Each token is predicted from as many tokens before it as in training, or from all.
    """

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.trained, self.context = trained, longest(trained.config)

    @property
    def eot_token_id(self) -> int:
        return self.trained.tokenizer.eod

    @property
    def prefix_token_id(self) -> int:
        return (self.trained.start or [self.eot_token_id])[0]

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        # a begin token where the harness's hf backend has one: so also, twice then, in loglikelihood_rolling
        is_whole = add_special_tokens is not False
        return self.trained.encode_prompt(string) if is_whole else self.trained.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._likelihoods([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(*request.args) for request in requests]
        return [likelihood for likelihood, _ in self._likelihoods([([self.prefix_token_id], text) for text in texts])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        progress = tqdm(requests, desc="generating", disable=disable_tqdm)
        return [self._generate(request.args[0], request.args[1], seed) for seed, request in enumerate(progress)]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Return, for each (context, continuation), the continuation's log-likelihood and whether greedy decoding would
        produce it."""
        pieces = [
            (index, window)
            for index, (before, after) in enumerate(pairs)
            for window in (
                document_windows(self.trained, after, self.context, self.context)
                if before == [self.prefix_token_id]
                else windows(torch.tensor(before + after), len(before), self.context, self.context)
            )
        ]
        sums, likeliest = [0.0] * len(pairs), [True] * len(pairs)
        for piece, loss, hit in scores(self.trained, [window for _, window in pieces]):
            sums[pieces[piece][0]] -= loss
            likeliest[pieces[piece][0]] &= hit
        return list(zip(sums, likeliest, strict=True))

    def _generate(self, prompt: str, options: dict[str, Any], seed: int) -> str:
        """Return the continuation of a prompt, up to a stop word, an end of document or max_gen_toks tokens (default
        256)."""
        settings = dict(normalize_gen_kwargs(options))
        if unknown := sorted(settings.keys() - GENERATION):
            known = ", ".join(sorted(GENERATION))
            raise UserError(f"generation_kwargs {', '.join(unknown)} are not supported; use only {known}")
        tokenizer, stops = self.trained.tokenizer, [word for word in settings["until"] if word]
        ids = self.trained.encode_prompt(prompt) or self.trained.start
        begin, new, text = len(tokenizer.decode(ids)), list[int](), ""
        temperature = settings.get("temperature", 0.0) if settings["do_sample"] else 0.0
        most, top_k = settings["max_gen_toks"], settings.get("top_k", 0)
        for (token,) in continuation(self.trained, ids, most, temperature, top_k, seed):
            if token == tokenizer.eod:
                break
            new.append(int(token))
            # Decode the whole: a token alone may be part of a character, or its text depend on the one before.
            text = tokenizer.decode(ids + new)[begin:]
            if any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)
