"""Shows what memory holds of a text: a page for any browser, a picture, and the numbers behind them.

Shapes: T tokens of the text, G key/value heads, M slots, K reads that are noted of a token.
"""

import argparse
import base64
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .cache_rmt import RMTCache
from .configuration_rmt import RMTConfig
from .evaluation.bits import evaluation_mode
from .files import write_whole
from .layout_rmt import check_ids
from .saving_rmt import reading_device
from .state_rmt import LayerState


MAX_TOKENS, NUM_READS, MOST_TOKENS = 4000, 6, 2**16 - 3  # a page has 16 bits for a position
SINK, NOTHING = -1, -2  # in place of the position of a token that is read
NEVER = 2**16 - 1  # in a page, of what was not dropped
WINDOW, PRESENT, LASTING = range(3)  # what held a token last


class Trace(NamedTuple):
    """What became of every token of a text in every layer and head, and what each token read."""

    words: list[str]  # of each token, up to where the next one begins
    segment_length: int
    window_length: int
    dropped: torch.Tensor  # (layers, G, T) int64: tokens from this position on cannot read it; -1 if it is still held
    part: torch.Tensor  # (layers, G, T) uint8: WINDOW, PRESENT or LASTING, whichever held it last
    read_positions: torch.Tensor  # (layers, G, T, K) int64, the tokens that are read most; SINK or NOTHING
    read_weights: torch.Tensor  # (layers, G, T, K) float32, largest first; means of the query heads of a key/value head
    shares: torch.Tensor  # (layers, G, T, 2) float32: how much of what is read is slots, and how much the sink

    def held(self, position: int) -> torch.Tensor:
        """Which tokens the token at a position can read, (layers, G, T) bool."""
        seen = torch.arange(len(self.words)) <= position
        return seen & ((self.dropped < 0) | (self.dropped > position))


@torch.no_grad()
def trace(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    max_tokens: int = MAX_TOKENS,
    num_reads: int = NUM_READS,
    show_progress: bool = False,
) -> Trace:
    """Reads a text from its beginning, segment by segment, and notes what every layer and head does with each token.

    Attention is eager while it reads, and as before afterwards. Weights are of the softmax over sink, slots and window:
    a local path is not among them. A token that is held by both parts of memory is read twice.

    Args:
        model: New, trained or converted; it is read without dropout.
        tokenizer: A fast one, which knows where in the text its tokens stand.
        text: Of any length.
        max_tokens: Where reading ends, 1 to 65,533.
        num_reads: Weights to note of each token, layer and head, the largest ones; 0 for none.
        show_progress: Whether to show a progress bar.

    Raises:
        ValueError: If an argument breaks its rule, or weights are asked of `fusion_type="softmax"`.

    Source: ours.
    """
    config = cast(RMTConfig, model.config)
    _check(config, tokenizer, max_tokens, num_reads)
    ids, words = _tokens(tokenizer, text, max_tokens)
    check_ids(ids, config.vocab_size)
    cache, segment = RMTCache(config), config.segment_length
    shape = (config.num_hidden_layers, config.key_value_shape[0], len(words))
    reads = torch.full((*shape, num_reads), NOTHING), torch.zeros(*shape, num_reads), torch.zeros(*shape, 2)
    found = Trace(words, segment, config.window_length, torch.full(shape, -1), torch.zeros(shape).byte(), *reads)

    def note_weights(module: Any, _: Any, output: Any) -> None:
        columns = _column_positions(cache, module.layer_idx, config, output[1].shape[-1])
        _note_weights(found, module.layer_idx, sum(cache.positions), output[1][0].float().cpu(), columns)

    with evaluation_mode(model), _attention_hooks(model, note_weights if num_reads else None):
        for start in tqdm(range(0, len(words), segment), "Reading", unit="segment", disable=not show_progress):
            columns = ids[:, start : start + segment].to(reading_device(model))
            model(columns, past_key_values=cache, logits_to_keep=1)
            for layer in range(shape[0]):
                _note_memory(found, layer, cache, config)
    return found


def _check(config: Any, tokenizer: PreTrainedTokenizerBase, max_tokens: int, num_reads: int) -> None:
    if getattr(config, "model_type", None) != RMTConfig.model_type:
        rule = f"model must be one with memory, got {getattr(config, 'model_type', config)!r}"
        raise ValueError(f"{rule}: rmt convert SOURCE TARGET gives it one.")
    if not tokenizer.is_fast:
        rule = f"tokenizer must be a fast one, got {type(tokenizer).__name__}"
        raise ValueError(f"{rule}: only these know where in the text a token stands. AutoTokenizer loads one.")
    if not 1 <= max_tokens <= MOST_TOKENS:
        raise ValueError(f"max_tokens must be from 1 to {MOST_TOKENS:,}, got {max_tokens}.")
    if num_reads < 0:
        raise ValueError(f"num_reads must be at least 0, got {num_reads}.")
    if num_reads and config.fusion_type == "softmax":
        rule = f'num_reads must be 0 with fusion_type="softmax", got {num_reads}'
        raise ValueError(f"{rule}: memory has a softmax of its own there, whose weights no layer gives.")


def _tokens(tokenizer: PreTrainedTokenizerBase, text: str, max_tokens: int) -> tuple[torch.Tensor, list[str]]:
    """The first tokens of a text as ids (1, T), and the text of each, from its beginning to that of the next."""
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if not ids:
        raise ValueError("text must have at least one token, got an empty one.")
    words, after = [], len(text)
    for token, (start, end) in zip(reversed(ids), reversed(offsets), strict=True):
        is_added = start == end  # by the tokenizer, as a begin-of-text token
        words.append(str(tokenizer.convert_ids_to_tokens(token)) if is_added else text[start:after])
        after = after if is_added else start
    return torch.tensor([ids[:max_tokens]]), words[::-1][:max_tokens]


@contextmanager
def _attention_hooks(model: PreTrainedModel, hook: Callable[[Any, Any, Any], None] | None) -> Iterator[None]:
    """Calls a hook after the attention of each layer, which gives its weights meanwhile."""
    if hook is None:
        yield
        return
    before: Any = model.config._attn_implementation
    handles = [
        module.register_forward_hook(hook)
        for module in model.modules()
        if type(module).__name__ == "RMTAttention"  # also one whose class came with the weights
    ]
    try:
        model.set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
        for handle in handles:
            handle.remove()


def _column_positions(cache: RMTCache, layer: int, config: RMTConfig, num_columns: int) -> torch.Tensor:
    """Which token each column of the weights of a layer is, (G, columns), in a call that goes on after the state."""
    state, heads, start = cache.layers[layer].state, config.key_value_shape[0], sum(cache.positions)
    if state is None:  # the first call: its own tokens
        return torch.arange(num_columns).expand(heads, -1)
    slots = state.memory.positions[0].cpu()  # (M, G)
    sink = slots.new_full((int(config.use_attention_sink), heads), SINK)
    prefix = torch.cat([sink, slots.masked_fill(slots < 0, NOTHING)]).sort(dim=0, stable=True).values
    window = torch.arange(config.window_length) + start - config.num_lookback_segments * config.segment_length
    window = window.masked_fill(window < 0, NOTHING)
    return torch.cat([prefix.T, window.expand(heads, -1)], 1)


def _note_weights(found: Trace, layer: int, start: int, weights: torch.Tensor, columns: torch.Tensor) -> None:
    """Notes what the tokens from `start` on read: weights (H, tokens, columns) of the positions (G, columns)."""
    weights = weights.unflatten(0, (len(columns), -1)).mean(1)
    tokens, is_slot = slice(start, start + weights.shape[1]), columns < _window_start(found, start)
    kinds = torch.stack([is_slot & (columns >= 0), columns == SINK], 2)  # (G, columns, 2)
    found.shares[layer, :, tokens] = weights @ kinds.float()
    values, indices = weights.topk(min(found.read_weights.shape[3], weights.shape[2]))
    positions = columns[:, None].expand(-1, weights.shape[1], -1).gather(2, indices)
    found.read_weights[layer, :, tokens, : values.shape[2]] = values
    found.read_positions[layer, :, tokens, : values.shape[2]] = positions.masked_fill(values == 0, NOTHING)


def _note_memory(found: Trace, layer: int, cache: RMTCache, config: RMTConfig) -> None:
    """Notes which tokens a state still holds in a layer, and which it has just dropped."""
    [now], num_tokens = cache.positions, len(found.words)
    slots = cast(LayerState, cache.layers[layer].state).memory.positions[0].T.cpu()  # (G, M)
    lasting = slots.shape[1] if config.num_lasting_slots is None else config.num_lasting_slots
    held = slots.new_zeros(len(slots), num_tokens + 1, dtype=torch.uint8)  # the last is for what was never written
    for kind, of_part in ((PRESENT, slots[:, lasting:]), (LASTING, slots[:, :lasting])):
        held.scatter_(1, of_part.masked_fill(of_part < 0, num_tokens), kind)
    held = held[:, :-1]
    is_gone = (held == 0) & (torch.arange(num_tokens) < _window_start(found, now)) & (found.dropped[layer] < 0)
    found.dropped[layer][is_gone] = now
    found.part[layer] = torch.where(held > 0, held, found.part[layer])


def write_page(found: Trace, path: str | Path, title: str = "What memory holds") -> None:
    """Writes one HTML file that needs nothing else: the text, and for every layer and head what it holds of it.

    Args:
        found: Of `trace`.
        path: Replaced if it exists.
        title: On top of the page.

    Raises:
        ValueError: If the path is a folder.
    """
    _check_path(path)
    gone = torch.where(found.dropped < 0, NEVER, found.dropped // found.segment_length)
    amounts = (found.part, *((each.sqrt() * 255).round() for each in (found.read_weights, found.shares)))
    packed = b"".join(each.numpy().astype("<u2").tobytes() for each in (found.read_positions - NOTHING, gone))
    packed += b"".join(each.numpy().astype("u1").tobytes() for each in amounts)
    facts = {"title": title, "words": found.words, "segment": found.segment_length, "window": found.window_length}
    facts |= {"layers": found.part.shape[0], "heads": found.part.shape[1], "reads": found.read_weights.shape[3]}
    page = resources.files(__package__).joinpath("inspection.html").read_text("utf-8")
    page = page.replace("{{packed}}", base64.b64encode(zlib.compress(packed, 9)).decode())
    page = page.replace("{{facts}}", json.dumps(facts).replace("<", "\\u003c"))  # so that no word ends the script
    write_whole(Path(path), lambda file: file.write_text(page, "utf-8"))


def _check_path(path: str | Path) -> None:
    if Path(path).is_dir():
        raise ValueError(f"{path} must be a file, got a folder: add a name to it.")


def write_picture(found: Trace, path: str | Path) -> None:
    """Draws what every layer and head holds of a text at its end, and how long it held the rest. Needs matplotlib.

    Args:
        found: Of `trace`.
        path: Its ending says which kind of picture; replaced if it exists.

    Raises:
        ValueError: If the path is a folder.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    _check_path(path)
    kinds = {"in the window": "#8fb3d9", "in a present slot": "#2e8b57", "in a lasting slot": "#d9480f"}
    num_layers, heads, num_tokens = found.part.shape
    colours = torch.tensor([to_rgb(colour) for colour in kinds.values()])
    positions = torch.arange(num_tokens)
    stay = (found.dropped - positions - found.window_length).clamp_min(0)  # of what was dropped, in memory
    grey = 0.97 - 0.45 * (stay / stay.amax().clamp_min(1)).sqrt()
    is_window = (found.dropped < 0) & (positions >= _window_start(found, num_tokens))
    shown = torch.where(is_window, WINDOW, found.part.long())
    image = torch.where((found.dropped < 0)[..., None], colours[shown], grey[..., None]).flatten(0, 1)
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(image.numpy(), aspect="auto", interpolation="nearest", extent=(0, num_tokens, num_layers, 0))
    axes.set(xlabel="token of the text", ylabel=f"layer ({heads} heads each)", title=f"After {num_tokens:,} tokens")
    greys = {"dropped when it left the window": "0.97", "the darker, the later dropped": "0.52"}
    patches = [Patch(color=colour, label=kind) for kind, colour in (kinds | greys).items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, frameon=False)
    write_whole(Path(path), lambda file: figure.savefig(file, dpi=120))


def _window_start(found: Trace, position: int) -> int:
    return position // found.segment_length * found.segment_length + found.segment_length - found.window_length


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser("rmt inspect", description=__doc__.splitlines()[0])
    parser.add_argument("model", help="folder or Hub id of a model with memory")
    parser.add_argument("text", type=Path, help="text file, UTF-8")
    parser.add_argument("page", type=Path, help="HTML file to write")
    parser.add_argument("--picture", type=Path, help="picture to write as well, a PNG for example")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="where reading ends (default %(default)s)")
    parser.add_argument("--num-reads", type=int, default=NUM_READS, help="of each token and head (default %(default)s)")
    args = parser.parse_args(arguments)
    for path in filter(None, (args.page, args.picture)):
        _check_path(path)
    text = args.text.read_text("utf-8")
    model: Any = AutoModelForCausalLM.from_pretrained(args.model)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    found = trace(model, tokenizer, text, args.max_tokens, args.num_reads, show_progress=True)
    write_page(found, args.page, args.text.name)
    if args.picture:
        write_picture(found, args.picture)
    print(f"{args.page}: {len(found.words):,} tokens")


if __name__ == "__main__":
    main()
