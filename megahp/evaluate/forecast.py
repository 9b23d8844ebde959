"""Forecast series by a trained run: paths of their next values, sampled digit by digit."""

from collections.abc import Sequence

import numpy as np
import torch

from megahp.errors import UserError
from megahp.evaluate.decode import Decoder, draw
from megahp.evaluate.sample import TrainedModel
from megahp.series.coding import SeriesCoding
from megahp.series.tokenizer import SeriesTokenizer

MOST_CACHED = 2**30  # bytes of keys and values; further paths are sampled after the others


def coding_of(trained: TrainedModel) -> SeriesCoding:
    """Return how a run on series codes them. Raises UserError for a run on text."""
    if not isinstance(trained.tokenizer, SeriesTokenizer):
        name = trained.config.data.tokenizer
        raise UserError(f"{trained.path} was trained on text (data.tokenizer = {name!r}); name a run on series")
    return trained.tokenizer.coding


def sample_series(trained: TrainedModel, given: Sequence[np.ndarray], samples: int, seed: int) -> np.ndarray:
    """Return so many paths of the values after each series, float64 [rows, samples, coding.horizon].

    given: rows of float [n], NaN = missing. The paths of a row depend on its number and the seed, and on no other row.
    """
    rows = [sample_paths(trained, values, samples, seed, row) for row, values in enumerate(given)]
    return np.stack(rows)


@torch.no_grad()
def sample_paths(trained: TrainedModel, values: np.ndarray, samples: int, seed: int, row: int) -> np.ndarray:
    """Return so many paths of the values after one series, float64 [samples, coding.horizon].

    values: float [n], NaN = missing, of which the last coding.conditioning count; two of these must differ
    (megahp.series.tables.unusable). row: the series' number, by which series of one seed have paths of their own. Each
    digit is drawn among its level's, with the model's probabilities.
    """
    coding, model = coding_of(trained), trained.model
    state = np.random.SeedSequence((seed, row)).generate_state(1, np.uint64)
    generator = torch.Generator(trained.device).manual_seed(int(state[0]))
    tokens, scale = coding.prompt(values)
    prompt = Decoder(model, coding.window_tokens)
    first = prompt(torch.from_numpy(tokens)[None].to(trained.device))
    at_once, found = max(1, MOST_CACHED // prompt.cache.bytes), []
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        decoder, logits, digits = prompt.repeated(count), first.expand(count, -1), list[torch.Tensor]()
        for place in range(coding.horizon_tokens):
            if digits:
                logits = decoder(digits[-1])
            ids = coding.ids_at(place)
            digits.append(draw(logits[:, ids.start : ids.stop].float(), 1.0, 0, generator) + ids.start)
        found.append(torch.cat(digits, 1))
    u = torch.rand(samples, coding.horizon, generator=generator, device=trained.device, dtype=torch.float64)
    return scale.undo(coding.forecast(torch.cat(found).cpu().numpy(), u.cpu().numpy()))
