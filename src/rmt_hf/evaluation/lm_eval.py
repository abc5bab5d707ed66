"""lm-eval for models that keep a state: nothing is cut, a context is read once, and memory does not grow.

    python -m rmt_hf.evaluation.lm_eval --model_args pretrained=FOLDER --tasks TASKS

The harness finds the adapter as `--model rmt`. Other models work too, if they take and return a cache.

Shapes: B rows, T columns of a call, L tokens of the longest continuation.
"""

import copy
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..modeling_rmt import MEMORIZE_TOKENS
from .bits import bits_of


NO_LIMIT = 2**30  # tokens: what the harness is told that a model can read
Scored = tuple[float, bool]  # log-likelihood of a continuation, and whether it is the greedy one


@register_model("rmt")
class RMTLM(HFLM):
    """The harness's adapter of Hugging Face models, which reads texts of any length slice by slice.

    - A context is read once for all its continuations. They go on from copies of the state, `batch_size` at a time.
    - `loglikelihood_rolling` gives the likelihood of a whole document, after the prefix token; the state is carried.
    - `generate_until` goes on from the state of its prompt.

    Log-likelihoods are computed in float32 at least and summed in float64.

    Args:
        pretrained: Folder, Hub id or model, as of the adapter `hf`.
        slice_length: Tokens of each row whose logits exist at once.
        batch_size: Continuations of one context, documents, or prompts that are read together.
        settings: Of the adapter `hf`, but `max_length`.

    Raises:
        ValueError: If the model is no decoder, `max_length` is given, or `batch_size` is no number.

    Source: ours; `lm_eval.models.huggingface.HFLM` for everything else.
    """

    def __init__(self, pretrained: Any, slice_length: int = 512, batch_size: int | str = 1, **settings: Any) -> None:
        if settings.pop("max_length", None) is not None:
            raise ValueError("max_length must be left out: this adapter cuts nothing. `--model hf` cuts.")
        if not str(batch_size).isdecimal() or int(batch_size) < 1 or slice_length < 1:
            got = f"batch_size={batch_size!r} and slice_length={slice_length!r}"
            raise ValueError(f"batch_size and slice_length must be numbers from 1 on, got {got}: give how many.")
        super().__init__(pretrained, batch_size=int(batch_size), **settings)
        if self.backend != "causal":
            raise ValueError(f"The model must be a decoder, got backend {self.backend!r}: use `--model hf`.")
        self.slice_length = slice_length
        self._prompt: tuple[torch.Tensor, torch.Tensor, Any] | None = None  # ids and mask read last, and the state

    @property
    def max_length(self) -> int:
        """Tokens that a text may have."""
        return NO_LIMIT

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of each whole document after the prefix token."""
        texts = [request.args[0] for request in requests]
        rows = [(None, [self.prefix_token_id], self.tok_encode(text)) for text in texts]
        found = [score for score, _ in self._loglikelihood_tokens(rows, disable_tqdm)]
        for text, score in zip(texts, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[Scored]:
        """Scores of (name, context, continuation), context by context."""
        members: dict[tuple[int, ...], list[int]] = {}
        for index, request in enumerate(requests):
            members.setdefault(tuple(request[1]), []).append(index)
        found: dict[int, Scored] = {}
        with tqdm(total=len(requests), desc="Reading", disable=disable_tqdm or self.rank != 0) as bar:
            for context, indices in members.items():
                indices.sort(key=lambda index: len(requests[index][2]))  # rows of a batch are of nearly one length
                state = self._read(torch.tensor([context[:-1]], dtype=torch.long))
                for start in range(0, len(indices), self.batch_size):
                    chosen = indices[start : start + self.batch_size]
                    scores = self._score(state, context[-1], [requests[index][2] for index in chosen])
                    found |= zip(chosen, scores, strict=True)
                    bar.update(len(chosen))
                for name, score in ((requests[index][0], found[index]) for index in indices):
                    if name is not None:  # documents have none
                        self.cache_hook.add_partial("loglikelihood", name, score)
        return [found[index] for index in range(len(requests))]

    def _score(self, state: Any, last: int, continuations: Sequence[list[int]]) -> list[Scored]:
        """Scores of continuations of one context, from the state before its last token, which is left as it is."""
        rows = [torch.tensor(continuation, dtype=torch.long) for continuation in continuations]
        targets = pad_sequence(rows, batch_first=True).to(self.device)  # (B, L); padding comes after all that counts
        is_real = pad_sequence([torch.ones_like(row, dtype=torch.bool) for row in rows], batch_first=True)
        ids = torch.cat([targets.new_full((len(rows), 1), last), targets[:, :-1]], 1)
        state, is_real = copy.deepcopy(state), is_real.to(self.device)
        if state is not None and len(rows) > 1:
            state.batch_repeat_interleave(len(rows))
        bits = torch.zeros(len(rows), dtype=torch.float64, device=self.device)
        is_greedy = torch.ones_like(bits, dtype=torch.bool)
        for start in range(0, targets.shape[1], self.slice_length):
            columns = slice(start, start + self.slice_length)
            output = self._call(ids[:, columns], state)
            state, wanted, real = output.past_key_values, targets[:, columns], is_real[:, columns]
            bits += (bits_of(output.logits, wanted).double() * real).sum(1)
            is_greedy &= ((output.logits.argmax(-1) == wanted) | ~real).all(1)
        return list(zip((bits * -math.log(2)).tolist(), is_greedy.tolist(), strict=True))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], attention_mask: torch.Tensor, **settings: Any
    ) -> torch.Tensor:
        """As of the adapter `hf`, from the state of the prompt, which is read once if it comes again."""
        known = self._prompt
        if known is None or not (torch.equal(known[0], context) and torch.equal(known[1], attention_mask)):
            known = context, attention_mask, self._read(context[:, :-1], attention_mask[:, :-1])
            self._prompt = known
        settings |= {"attention_mask": attention_mask, "past_key_values": copy.deepcopy(known[2])}
        return super()._model_generate(context, max_length, stop, **settings)

    def _read(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Any:
        """The state after ids (B, T), which are read without logits; None after none."""
        state, length, padding = None, max(1, MEMORIZE_TOKENS // len(ids)), {}
        for start in range(0, ids.shape[1], length):
            end = start + length
            if attention_mask is not None:
                positions = (attention_mask.cumsum(1) - 1).clamp(min=0)[:, start:end]
                padding = {"attention_mask": attention_mask[:, :end], "position_ids": positions}
            state = self._call(ids[:, start:end].to(self.device), state, logits_to_keep=1, **padding).past_key_values
        return state

    @torch.no_grad()
    def _call(self, ids: torch.Tensor, state: Any, **kwargs: Any) -> Any:
        dtype = self.mixed_precision_dtype
        with torch.autocast(self.device.type, dtype=dtype, enabled=dtype is not None):
            return self.model(input_ids=ids, past_key_values=state, use_cache=True, **kwargs)


def main(arguments: list[str] | None = None) -> None:
    """The command line of the harness, in which `rmt` is a model, and the one that is meant if none is named."""
    given, before = sys.argv[1:] if arguments is None else list(arguments), sys.argv
    names_model = any(word.split("=")[0] in ("--model", "-M", "--config", "-C") for word in given)
    is_run = bool(given) and given[0] not in ("ls", "validate", "-h", "--help") and not names_model
    sys.argv = ["rmt evaluate", *given, *(("--model", "rmt") if is_run else ())]
    try:
        cli_evaluate()
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
