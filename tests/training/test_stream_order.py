"""Data sets of streams: every token once, in slices without a gap, the same for any number of workers."""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import default_data_collator

from rmt_hf.training.streams import IterableStreamDataset, StreamDataset


S, L = 8, 24  # segments and slices


def documents(lengths: list[int], with_labels: bool = False, seed: int = 0) -> Dataset:
    """Documents whose first token is their number, and whose others are their positions in the document."""
    columns = {"input_ids": [[number + 1000, *range(1, n)][:n] for number, n in enumerate(lengths)]}
    if with_labels:
        columns["labels"] = [
            [-100 if position % 3 == 0 else token for position, token in enumerate(ids)] for ids in columns["input_ids"]
        ]
    return Dataset.from_dict({"title": [str(n) for n in lengths], **columns})


LENGTHS = [5, 60, 1, 24, 7, 33, 8, 16, 0, 100, 3, 48, 9]


def read_streams(items: list[dict], num_streams: int) -> list[list[dict]]:
    """The slices of each stream."""
    return [items[stream::num_streams] for stream in range(num_streams)]


def check_stream(parts: list[dict], want: Dataset) -> list[int]:
    """Checks every column of a stream against its documents, and returns their numbers."""
    joined = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    real = joined["attention_mask"] == 1
    starts = (real & (joined["position_ids"] == 0)).nonzero().flatten().tolist()
    found = []
    for start in starts:
        number = int(joined["input_ids"][start]) - 1000
        ids = torch.tensor(want[number]["input_ids"])
        labels = torch.tensor(want[number].get("labels", want[number]["input_ids"]))
        span = slice(start, start + len(ids))
        assert start % S == 0
        assert torch.equal(joined["input_ids"][span], ids) and real[span].all()
        assert torch.equal(joined["position_ids"][span], torch.arange(len(ids)))
        assert joined["labels"][start] == -100 and torch.equal(joined["labels"][span][1:], labels[1:])
        assert torch.equal(joined["shift_labels"][span][:-1], labels[1:])  # also across the ends of slices
        assert joined["shift_labels"][start + len(ids) - 1] == -100  # the next document is not predicted
        found.append(number)
    assert int(real.sum()) == sum(len(want[number]["input_ids"]) for number in found)
    assert (joined["labels"][~real] == -100).all() and (joined["shift_labels"][~real] == -100).all()
    return found


@pytest.mark.parametrize("with_labels", [False, True])
@pytest.mark.parametrize("num_streams", [1, 3, 20])
def test_every_document_is_read_once_and_whole(num_streams: int, with_labels: bool) -> None:
    data = documents(LENGTHS, with_labels)
    streams = StreamDataset(data, num_streams, L, S, seed=3)
    for epoch in range(2):
        items = [streams[epoch * len(streams) + index] for index in range(len(streams))]
        found = [check_stream(parts, data) for parts in read_streams(items, num_streams)]
        assert sorted(number for stream in found for number in stream) == [
            number for number, n in enumerate(LENGTHS) if n
        ]
    columns = sum(int(item["attention_mask"].sum()) for item in items)
    assert streams.padding_share == pytest.approx(1 - columns / (len(items) * L))


def test_streams_are_of_balanced_length() -> None:
    lengths = np.random.default_rng(0).integers(1, 40 * S, 300).tolist()
    streams = StreamDataset(documents(lengths), 8, L, S)
    columns = [int(streams.columns[stream].sum()) for stream in streams.streams]
    assert max(columns) - min(columns) <= 2 * S
    assert streams.padding_share < S / np.mean(lengths)


def test_the_seed_and_the_epoch_decide_the_order_and_nothing_else_does() -> None:
    def order(seed: int | None, epoch: int = 0, again: bool = False) -> list[int]:
        streams = StreamDataset(documents(LENGTHS), 1, L, S, seed=seed)
        return check_stream(
            [streams[epoch * len(streams) + index] for index in range(len(streams))], documents(LENGTHS)
        )

    assert order(1) == order(1) != order(2)
    assert order(1, epoch=1) == order(1, epoch=1) != order(1)
    assert order(None) == order(None, epoch=1) == sorted(order(1))


@pytest.mark.parametrize("repeat", [False, True])
def test_an_iterable_data_set_gives_streams_too(repeat: bool) -> None:
    data = documents(LENGTHS, with_labels=True)
    stream = IterableStreamDataset(data.to_iterable_dataset(num_shards=3), 3, L, S, repeat=repeat)
    items = [item for item, _ in zip(stream, range(90), strict=False)]
    assert len(items) == 90 if repeat else len(items) % 3 == 0
    if repeat:
        return
    found = [check_stream(parts, data) for parts in read_streams(items, 3)]
    assert sorted(number for stream in found for number in stream) == [number for number, n in enumerate(LENGTHS) if n]


def test_a_repeated_data_set_is_shuffled_anew() -> None:
    data = documents(LENGTHS)
    shuffled = data.to_iterable_dataset().shuffle(seed=5, buffer_size=100)
    num_documents, stream = sum(n > 0 for n in LENGTHS), iter(IterableStreamDataset(shuffled, 1, L, S, repeat=True))
    first = []
    while len(first) < 2 * num_documents:
        item = next(stream)
        first += (item["input_ids"][(item["position_ids"] == 0) & (item["attention_mask"] == 1)] - 1000).tolist()
    epochs = first[:num_documents], first[num_documents : 2 * num_documents]
    assert sorted(epochs[0]) == sorted(epochs[1]) and epochs[0] != epochs[1]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")  # how workers are made
@pytest.mark.parametrize("streaming", [False, True])
def test_any_number_of_workers_gives_the_same(streaming: bool) -> None:
    data = documents(LENGTHS)
    streams = (
        IterableStreamDataset(data.to_iterable_dataset(num_shards=4), 2, L, S)
        if streaming
        else StreamDataset(data, 2, L, S, seed=0)
    )
    batches = [list(DataLoader(streams, 2, collate_fn=default_data_collator, num_workers=n)) for n in (0, 2)]
    assert len(batches[0]) == len(batches[1]) > 5
    for one, other in zip(*batches, strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("kind", [StreamDataset, IterableStreamDataset])
def test_bad_sizes_are_refused(kind: type) -> None:
    data = documents(LENGTHS) if kind is StreamDataset else documents(LENGTHS).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"stream_length must be a multiple of segment_length \(8\).*got 20"):
        kind(data, 2, 20, S)
    with pytest.raises(ValueError, match="num_streams must be at least 1, got 0"):
        kind(data, 0, L, S)


def test_bad_documents_are_refused() -> None:
    with pytest.raises(ValueError, match=r"column `input_ids`, got \['text'\]: rmt_hf.data.tokenize"):
        StreamDataset(Dataset.from_dict({"text": ["a"]}), 1, L, S)
    with pytest.raises(ValueError, match="got 2 that have none or one"):
        StreamDataset(documents([1, 0]), 1, L, S)
    uneven = Dataset.from_dict({"input_ids": [[1, 2, 3]], "labels": [[1, 2]]})
    with pytest.raises(ValueError, match=r"labels must be as many as the input_ids of their document \(3\), got 2"):
        StreamDataset(uneven, 1, L, S)[0]
