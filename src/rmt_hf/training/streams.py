"""Data sets for stream mode: each row of a batch reads documents one after another, and goes on in the next batch.

Item i is slice i // num_streams of stream i % num_streams. Batches of equal size, read in this order by any number of
processes, keep every row on its stream.

Shapes: L stream length, the columns of a slice.
"""

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler

from ..data import document_columns, join_columns


class StreamDataset(torch.utils.data.Dataset):
    """Streams over documents with random access: of balanced length, shuffled anew in every epoch.

    Documents are padded to whole segments. The longest ones are assigned first, each to the shortest stream. Item
    `epoch * len(self) + i` is item i of an epoch.

    Args:
        documents: With a column `input_ids` and, if not every token is to be learned, `labels`.
        num_streams: Rows of the batches of all processes together.
        stream_length: L, a multiple of `segment_length`.
        segment_length: `config.segment_length` of the model.
        seed: Of the order of the documents in each stream and epoch; None leaves them as they are.

    Raises:
        ValueError: If the sizes do not fit, or there are no documents.
    """

    def __init__(
        self, documents: Dataset, num_streams: int, stream_length: int, segment_length: int, seed: int | None = None
    ) -> None:
        check_sizes(num_streams, stream_length, segment_length)
        self.documents = documents.with_format("numpy", columns=_used_columns(documents))
        self.num_streams, self.stream_length, self.segment_length = num_streams, stream_length, segment_length
        self.seed = seed
        arrow = documents.select_columns("input_ids").with_format("arrow")
        counts = [batch["input_ids"].value_lengths().to_numpy() for batch in map(dict_of, arrow.iter(10_000))]
        lengths = np.concatenate([*counts, np.zeros(0, np.int64)])
        self.num_tokens = int(lengths.sum())
        if lengths.max(initial=0) < 2:
            rule = "documents must have two tokens or more in `input_ids`, so that one can be predicted"
            raise ValueError(f"{rule}, got {len(documents)} that have none or one.")
        self.columns = -(-lengths // segment_length) * segment_length  # of each document, padded to whole segments
        self.streams = self._balanced_streams()
        self.num_slices = max(-(-int(self.columns[stream].sum()) // stream_length) for stream in self.streams)

    @property
    def padding_share(self) -> float:
        """Share of the columns of an epoch that are padding."""
        return 1 - self.num_tokens / (len(self) * self.stream_length)

    def __len__(self) -> int:
        return self.num_slices * self.num_streams

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One slice: `input_ids`, `attention_mask`, `position_ids`, `labels`, `shift_labels`, each (L,) int64."""
        epoch, index = divmod(index, len(self))
        slice_index, stream = divmod(index, self.num_streams)
        start = slice_index * self.stream_length
        order = self._order(epoch, stream)
        ends = self.columns[order].cumsum()
        parts: list[dict[str, np.ndarray]] = []
        first = int(np.searchsorted(ends, start, side="right"))
        for number in range(first, len(order)):
            begin = int(ends[number] - self.columns[order[number]])
            if begin >= start + self.stream_length:
                break
            span = max(0, start - begin), start + self.stream_length + 1 - begin  # and the label of the next column
            parts.append(_columns_of(self.documents[int(order[number])], self.segment_length, *span))
        return slice_of(parts, self.stream_length)

    def _balanced_streams(self) -> list[np.ndarray]:
        """The documents of each stream, in their order."""
        streams: list[list[int]] = [[] for _ in range(self.num_streams)]
        shortest = [(0, stream) for stream in range(self.num_streams)]
        for document in np.argsort(-self.columns, kind="stable").tolist():
            length, stream = heapq.heappop(shortest)
            streams[stream].append(document)
            heapq.heappush(shortest, (length + int(self.columns[document]), stream))
        return [np.array(sorted(stream), dtype=np.int64) for stream in streams]

    def _order(self, epoch: int, stream: int) -> np.ndarray:
        """The documents of a stream in the order of an epoch."""
        if self.seed is None:
            return self.streams[stream]
        return np.random.default_rng((self.seed, epoch, stream)).permutation(self.streams[stream])


class StreamSampler(Sampler[int]):
    """The items of a `StreamDataset` in their order, in the epoch that is set."""

    def __init__(self, dataset: StreamDataset) -> None:
        self.dataset, self.epoch = dataset, 0

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[int]:
        first = self.epoch * len(self.dataset)
        return iter(range(first, first + len(self.dataset)))


class IterableStreamDataset(torch.utils.data.IterableDataset):
    """Streams over documents without random access: a stream that runs out takes the next document.

    One worker reads, whatever their number. The order is that of the documents: `documents.shuffle(seed=...)`.

    Args:
        documents: With a column `input_ids` and, if not every token is to be learned, `labels`.
        num_streams: Rows of the batches of all processes together.
        stream_length: L, a multiple of `segment_length`.
        segment_length: `config.segment_length` of the model.
        repeat: Whether to begin again, with the next epoch, when the documents end.

    Raises:
        ValueError: If the sizes do not fit.
    """

    def __init__(
        self,
        documents: IterableDataset,
        num_streams: int,
        stream_length: int,
        segment_length: int,
        repeat: bool = False,
    ) -> None:
        check_sizes(num_streams, stream_length, segment_length)
        self.documents, self.num_streams, self.repeat = documents, num_streams, repeat
        self.stream_length, self.segment_length = stream_length, segment_length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id:
            return
        documents = self._documents()
        streams: list[list[dict[str, np.ndarray]]] = [[] for _ in range(self.num_streams)]
        while True:
            for stream in streams:
                missing = self.stream_length - sum(len(part["input_ids"]) for part in stream)
                while missing > 0 and (document := next(documents, None)) is not None:
                    stream.append(document)
                    missing -= len(document["input_ids"])
            if not any(streams):
                return
            for index, stream in enumerate(streams):
                yield slice_of(stream, self.stream_length)
                streams[index] = _after(stream, self.stream_length)

    def _documents(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns of every document: `iter` gives a worker all of them, a plain loop only its shards."""
        epoch, found = 0, True
        while found:
            self.documents.set_epoch(epoch)
            found = False
            for batch in self.documents.iter(16):
                for number, ids in enumerate(batch["input_ids"]):
                    document = {"input_ids": ids, "labels": batch.get("labels", batch["input_ids"])[number]}
                    yield _columns_of(document, self.segment_length)
                    found = self.repeat
            epoch += 1


def check_sizes(num_streams: int, stream_length: int, segment_length: int) -> None:
    """Refuses slices that are not whole segments."""
    if num_streams < 1:
        raise ValueError(f"num_streams must be at least 1, got {num_streams}.")
    if stream_length < 1 or stream_length % segment_length:
        raise ValueError(
            f"stream_length must be a multiple of segment_length ({segment_length}), so that documents begin at "
            f"segment starts; got {stream_length}."
        )


def slice_of(parts: list[dict[str, np.ndarray]], length: int) -> dict[str, torch.Tensor]:
    """The first `length` columns of a stream, (L,) int64 each, with `shift_labels`, the labels of the next column."""
    whole = sum(len(part["input_ids"]) for part in parts)
    columns = join_columns(parts, max(whole, length + 1))
    shifted = columns["labels"][1 : length + 1]
    columns = {name: column[:length] for name, column in columns.items()}
    return {name: torch.from_numpy(column) for name, column in {**columns, "shift_labels": shifted}.items()}


def dict_of(table: object) -> dict:
    """The columns of an arrow table, each as one array."""
    return {name: table[name].combine_chunks() for name in table.column_names}  # type: ignore[attr-defined, index]


def _used_columns(documents: Dataset) -> list[str]:
    if "input_ids" not in documents.column_names:
        raise ValueError(
            f"documents must have a column `input_ids`, got {documents.column_names}: rmt_hf.data.tokenize makes it."
        )
    return [name for name in ("input_ids", "labels") if name in documents.column_names]


def _columns_of(document: dict, segment_length: int, *span: int) -> dict[str, np.ndarray]:
    labels = document.get("labels", document["input_ids"])
    return document_columns(document["input_ids"], labels, segment_length, *span)


def _after(parts: list[dict[str, np.ndarray]], length: int) -> list[dict[str, np.ndarray]]:
    """The columns of a stream after its first `length`."""
    rest = []
    for part in parts:
        size = len(part["input_ids"])
        if size > length:
            rest.append({name: column[length:] for name, column in part.items()})
        length = max(0, length - size)
    return rest
