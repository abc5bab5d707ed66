"""Lanes: every row of a batch reads documents one after another, in pieces, so that a state can be carried along.

Item i of a data set here is piece i // num_lanes of lane i % num_lanes. Read in this order, in batches of equal size
and by any number of processes that take turns, every row of every batch goes on where that row ended in the batch
before it. A home file.

Shapes: L stream length, the columns of a piece.
"""

import heapq
from collections.abc import Iterator

import numpy as np
import torch
from datasets import Dataset, IterableDataset

from .data import document_columns, join_columns


class Lanes(torch.utils.data.Dataset):
    """Lanes over documents that can be looked up: equally long, shuffled anew in every epoch, the same on any machine.

    Documents are padded to whole segments, and dealt out once, the longest first, each to the shortest lane. Item
    `epoch * len(self) + i` is item i of an epoch.

    Args:
        documents: With a column `input_ids` and, if not every token is to be learned, `labels`.
        num_lanes: Rows of the batches of all processes together.
        stream_length: L, a multiple of `segment_length`.
        segment_length: `config.segment_length` of the model.
        seed: Of the order of the documents in each lane and epoch; None leaves them as they are.

    Raises:
        ValueError: If the sizes do not fit, or there are no documents.
    """

    def __init__(
        self, documents: Dataset, num_lanes: int, stream_length: int, segment_length: int, seed: int | None = None
    ) -> None:
        check_lanes(num_lanes, stream_length, segment_length)
        self.documents = documents.with_format("numpy", columns=_used_columns(documents))
        self.num_lanes, self.stream_length, self.segment_length = num_lanes, stream_length, segment_length
        self.seed = seed
        arrow = documents.select_columns("input_ids").with_format("arrow")
        counts = [batch["input_ids"].value_lengths().to_numpy() for batch in map(dict_of, arrow.iter(10_000))]
        lengths = np.concatenate([*counts, np.zeros(0, np.int64)])
        self.num_tokens = int(lengths.sum())
        if not self.num_tokens:
            raise ValueError(f"documents must have tokens in `input_ids`, got {len(documents)} documents without any.")
        self.columns = -(-lengths // segment_length) * segment_length  # of each document, padded to whole segments
        self.lanes = self._deal()
        self.num_pieces = max(-(-int(self.columns[lane].sum()) // stream_length) for lane in self.lanes)

    @property
    def padding_share(self) -> float:
        """Share of the columns of an epoch that are padding."""
        return 1 - self.num_tokens / (len(self) * self.stream_length)

    def __len__(self) -> int:
        return self.num_pieces * self.num_lanes

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One piece: `input_ids`, `attention_mask`, `position_ids`, `labels`, `shift_labels`, each (L,) int64."""
        epoch, index = divmod(index, len(self))
        piece, lane = divmod(index, self.num_lanes)
        start = piece * self.stream_length
        order = self._order(epoch, lane)
        ends = self.columns[order].cumsum()
        parts: list[dict[str, np.ndarray]] = []
        first = int(np.searchsorted(ends, start, side="right"))
        for number in range(first, len(order)):
            begin = int(ends[number] - self.columns[order[number]])
            if begin >= start + self.stream_length:
                break
            span = max(0, start - begin), start + self.stream_length + 1 - begin  # and the label of the next column
            parts.append(_columns_of(self.documents[int(order[number])], self.segment_length, *span))
        return piece_of(parts, self.stream_length)

    def _deal(self) -> list[np.ndarray]:
        """The documents of each lane, in their order."""
        lanes: list[list[int]] = [[] for _ in range(self.num_lanes)]
        shortest = [(0, lane) for lane in range(self.num_lanes)]
        for document in np.argsort(-self.columns, kind="stable").tolist():
            length, lane = heapq.heappop(shortest)
            lanes[lane].append(document)
            heapq.heappush(shortest, (length + int(self.columns[document]), lane))
        return [np.array(sorted(lane), dtype=np.int64) for lane in lanes]

    def _order(self, epoch: int, lane: int) -> np.ndarray:
        """The documents of a lane in the order of an epoch."""
        if self.seed is None:
            return self.lanes[lane]
        return np.random.default_rng((self.seed, epoch, lane)).permutation(self.lanes[lane])


class StreamedLanes(torch.utils.data.IterableDataset):
    """Lanes over documents that can only be read one after another: the lane that runs out takes the next document.

    One worker reads, whatever their number. The order is that of the documents: `documents.shuffle(seed=...)`.

    Args:
        documents: A stream, with a column `input_ids` and, if not every token is to be learned, `labels`.
        num_lanes: Rows of the batches of all processes together.
        stream_length: L, a multiple of `segment_length`.
        segment_length: `config.segment_length` of the model.
        repeat: Whether to begin again, with the next epoch, when the documents end.

    Raises:
        ValueError: If the sizes do not fit.
    """

    def __init__(
        self, documents: IterableDataset, num_lanes: int, stream_length: int, segment_length: int, repeat: bool = False
    ) -> None:
        check_lanes(num_lanes, stream_length, segment_length)
        self.documents, self.num_lanes, self.repeat = documents, num_lanes, repeat
        self.stream_length, self.segment_length = stream_length, segment_length

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None and worker.id:
            return
        documents = self._documents()
        lanes: list[list[dict[str, np.ndarray]]] = [[] for _ in range(self.num_lanes)]
        while True:
            for lane in lanes:
                missing = self.stream_length - sum(len(part["input_ids"]) for part in lane)
                while missing > 0 and (document := next(documents, None)) is not None:
                    lane.append(document)
                    missing -= len(document["input_ids"])
            if not any(lanes):
                return
            for index, lane in enumerate(lanes):
                yield piece_of(lane, self.stream_length)
                lanes[index] = _after(lane, self.stream_length)

    def _documents(self) -> Iterator[dict[str, np.ndarray]]:
        """Columns of the documents. Iterating over a stream would give a worker its share of them, `iter` gives all."""
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


def check_lanes(num_lanes: int, stream_length: int, segment_length: int) -> None:
    """Refuses pieces that are no whole segments."""
    if num_lanes < 1:
        raise ValueError(f"num_lanes must be at least 1, got {num_lanes}.")
    if stream_length < 1 or stream_length % segment_length:
        raise ValueError(
            f"stream_length must be a multiple of segment_length ({segment_length}), so that documents begin at "
            f"segment starts; got {stream_length}."
        )


def piece_of(parts: list[dict[str, np.ndarray]], length: int) -> dict[str, torch.Tensor]:
    """The first columns of a lane as a piece, with the labels of the next column besides: (L,) int64 each."""
    whole = sum(len(part["input_ids"]) for part in parts)
    columns = join_columns(parts, max(whole, length + 1))
    piece = {name: column[:length] for name, column in columns.items()}
    piece["shift_labels"] = columns["labels"][1 : length + 1]
    return {name: torch.from_numpy(column) for name, column in piece.items()}


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
    """What remains of a lane after its first columns."""
    rest = []
    for part in parts:
        size = len(part["input_ids"])
        if size > length:
            rest.append({name: column[length:] for name, column in part.items()})
        length = max(0, length - size)
    return rest
