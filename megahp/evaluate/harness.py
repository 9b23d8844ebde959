"""A trained run as EleutherAI's lm-evaluation-harness (0.4.13) sees a model: what its tasks ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from megahp.errors import UserError
from megahp.evaluate.perplexity import scores, windows
from megahp.evaluate.sample import TrainedModel, continuation
from megahp.model.build import longest

GENERATION = {"until", "max_gen_toks", "do_sample", "temperature", "top_k"}


class Harness(TemplateLM):
    """How context and continuation become tokens is the harness's own rule; the end-of-document token stands before a
    text that has no context. Each token is predicted from as many before it as the run was trained on, or all."""

    def __init__(self, trained: TrainedModel) -> None:
        super().__init__()
        self.trained, self.context = trained, longest(trained.config)

    @property
    def eot_token_id(self) -> int:
        return self.trained.tokenizer.eod

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.trained.tokenizer.encode(string)

    def _loglikelihood_tokens(self, requests: Sequence[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        return self._likelihoods([(before, after) for _, before, after in requests])

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(*request.args) for request in requests]
        return [likelihood for likelihood, _ in self._likelihoods([([self.eot_token_id], text) for text in texts])]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        rows = tqdm(requests, desc="generating", disable=disable_tqdm)
        return [self._generate(request.args[0], request.args[1], seed) for seed, request in enumerate(rows)]

    def _likelihoods(self, pairs: Sequence[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        """Of each pair: the log-likelihood of its second part after its first, and whether each token of it is the
        likeliest one."""
        found = [
            (number, window)
            for number, (before, after) in enumerate(pairs)
            for window in windows(torch.tensor(before + after), len(before), self.context, self.context)
        ]
        sums, likeliest = [0.0] * len(pairs), [True] * len(pairs)
        for piece, loss, hit in scores(self.trained, [window for _, window in found]):
            sums[found[piece][0]] -= loss
            likeliest[found[piece][0]] &= hit
        return list(zip(sums, likeliest, strict=True))

    def _generate(self, prompt: str, options: dict[str, Any], seed: int) -> str:
        """What follows the prompt, up to a stop word, the end of a document or max_gen_toks tokens (default 256)."""
        wanted = dict(normalize_gen_kwargs(options))
        if unknown := sorted(wanted.keys() - GENERATION):
            known = ", ".join(GENERATION)
            raise UserError(f"generation_kwargs {', '.join(unknown)} mean nothing here; there are {known}")
        tokenizer, stops = self.trained.tokenizer, [word for word in wanted["until"] if word]
        ids = tokenizer.encode(prompt) or [tokenizer.eod]
        begin, new, text = len(tokenizer.decode(ids)), list[int](), ""
        temperature = wanted.get("temperature", 0.0) if wanted["do_sample"] else 0.0
        following = continuation(self.trained, ids, temperature, wanted.get("top_k", 0), seed)
        while len(new) < wanted["max_gen_toks"] and (token := next(following)) != tokenizer.eod:
            new.append(token)
            text = tokenizer.decode(ids + new)[begin:]
            if any(stop in text for stop in stops):
                break
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)
