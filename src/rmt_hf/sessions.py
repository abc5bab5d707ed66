"""States of conversations, found again by the tokens that they have read: in memory, and in a folder."""

import hashlib
import json
import logging
import re
from array import array
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch

from .cache_rmt import RMTCache
from .files import remove_folder, write_whole
from .modeling_rmt import RMTForCausalLM
from .saving_rmt import reading_device, sample_weights, state_fingerprint


logger = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")
# Number of tokens, and their SHA-256. A state's own hash would not do here: it is no secret how to find other tokens
# with the same one, and a state that was put in place of another's would answer for it.
Key = tuple[int, str]


@dataclass
class Kept:
    """A state in memory, on the disk, or both."""

    state: RMTCache | None
    bytes_on_disk: int = 0


class Sessions:
    """States by what they have read. The least recently used move to a folder, and at last are dropped.

    For one thread. Nothing is shared: a state that is found is a copy. A folder holds whole states at every moment,
    those of each model apart, and is used again by the next process.

    Args:
        model: Whose states they are.
        folder: For what has no room in memory, and for names; None keeps everything in memory.
        memory_bytes: At most so many bytes of states are kept in memory,
        disk_bytes: and so many in the folder.

    Source: ours.
    """

    def __init__(
        self,
        model: RMTForCausalLM,
        folder: str | Path | None = None,
        memory_bytes: int = 2_000_000_000,
        disk_bytes: int = 20_000_000_000,
    ) -> None:
        self.model, self.folder = model, None if folder is None else Path(folder)
        self.memory_bytes, self.disk_bytes = memory_bytes, disk_bytes
        self.state_bytes = model.memorize(torch.zeros(1, 1, dtype=torch.long, device=reading_device(model))).nbytes
        self.states: OrderedDict[Key, Kept] = OrderedDict()  # the least recently used first
        self.names: dict[str, list[Key]] = {}
        if self.folder is not None:  # one for each model: nobody loses states by starting with another
            which = json.dumps([state_fingerprint(model.config), sample_weights(model.base_model)], default=str)
            self.folder /= hashlib.sha256(which.encode()).hexdigest()[:16]
            self._look_into(self.folder)

    def find(self, ids: list[int]) -> RMTCache:
        """A copy of the state that has read the longest beginning of `ids`, but not all; an empty one if none has."""
        lengths, digest, start = sorted({length for length, _ in self.states if length < len(ids)}), hashlib.sha256(), 0
        keys = []
        for length in lengths:
            digest.update(array("q", ids[start:length]))
            keys.append((length, digest.hexdigest()))
            start = length
        for key in reversed(keys):
            if key in self.states and (state := self._load(key)) is not None:
                return state
        return RMTCache(self.model.config)

    def keep(self, ids: list[int], state: RMTCache) -> Key:
        """Keeps a state, which nobody changes from now on, of `ids`, which are all that it has read."""
        key = len(ids), hashlib.sha256(array("q", ids)).hexdigest()
        kept = self.states.setdefault(key, Kept(None))
        kept.state = state
        self.states.move_to_end(key)
        self._shrink()
        return key

    def check_room(self, name: str, num_states: int = 2) -> None:
        """ValueError if so many states cannot be kept under a name."""
        if self.folder is None or not NAME.fullmatch(name):
            got = f"got {name!r} and {self.folder}"
            raise ValueError(f"A session must have a name like {NAME.pattern} and a folder to be kept in, {got}.")
        others = {key for other, keys in self.names.items() if other != name for key in keys}
        if (len(others) + num_states) * self.state_bytes > self.disk_bytes:
            rule = f"Sessions must have at most {self.disk_bytes:,} bytes, of which {len(self.names)} leave too few"
            remedy = f"start with a larger limit, or delete some of {self.folder / 'names'} and start again"
            raise ValueError(f"{rule}: {remedy}.")

    def save(self, name: str, states: dict[Key, RMTCache]) -> None:
        """Keeps states on the disk under a name, in place of those before; they are never dropped.

        Args:
            name: Letters, digits, dots, dashes and underscores, 64 at most.
            states: By what `keep` has returned for them.
        """
        self.check_room(name, len(states))
        for key, state in states.items():
            self._write(key, self.states.setdefault(key, Kept(None)), state)
        # Last, in one step: until then the name stands for the states before, which are still there.
        text = json.dumps(list(states))
        write_whole(self._path("names", f"{name}.json"), lambda path: path.write_text(text, "utf-8"))
        self.names[name] = list(states)
        self._shrink()

    def _path(self, *names: str) -> Path:
        return cast(Path, self.folder).joinpath(*names)

    def _state_path(self, key: Key) -> Path:
        return self._path("states", f"{key[0]}-{key[1]}")

    def _look_into(self, folder: Path) -> None:
        """Takes over what another process has left."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # a state has the last tokens that were said
        for unfinished in folder.glob("*/.unfinished-*"):
            remove_folder(unfinished)
            unfinished.unlink(missing_ok=True)
        for path in sorted((folder / "states").glob("*-*"), key=lambda path: path.stat().st_mtime):
            length, _, digest = path.name.partition("-")
            if length.isdigit():
                self.states[int(length), digest] = Kept(None, _size(path))
        for file in (folder / "names").glob("*.json"):
            keys = [(length, digest) for length, digest in json.loads(file.read_text("utf-8"))]
            self.names[file.stem] = [key for key in keys if key in self.states]
        self._shrink()

    def _load(self, key: Key) -> RMTCache | None:
        """A copy of a state; None, and the state is no longer known, if it is damaged."""
        kept = self.states[key]
        if kept.state is None:
            try:
                kept.state = RMTCache.from_pretrained(self._state_path(key), self.model)
                self._state_path(key).touch()  # the next process knows that it was used, too
            except (OSError, ValueError) as error:
                logger.warning("A state of %d tokens is read anew: %s", key[0], error)
                self._forget(key)
                return None
        self.states.move_to_end(key)
        found = kept.state.clone()
        self._shrink()
        return found

    def _forget(self, key: Key) -> None:
        del self.states[key]
        self.names = {name: [each for each in keys if each != key] for name, keys in self.names.items()}

    def _write(self, key: Key, kept: Kept, state: RMTCache) -> None:
        if not kept.bytes_on_disk:
            write_whole(self._state_path(key), state.save_pretrained)
            kept.bytes_on_disk = _size(self._state_path(key))

    def _shrink(self) -> None:
        """Moves what is over the limits from memory to the disk, and from there away."""
        in_memory = [(key, kept) for key, kept in self.states.items() if kept.state is not None]
        num_bytes = sum(kept.state.nbytes for _, kept in in_memory if kept.state is not None)
        for key, kept in in_memory:
            if num_bytes <= self.memory_bytes:
                break
            if kept.state is not None:
                num_bytes -= kept.state.nbytes
                if self.folder is not None:
                    try:
                        self._write(key, kept, kept.state)
                    except (OSError, ValueError) as error:
                        logger.warning("A state of %d tokens is dropped: %s", key[0], error)
            kept.state = None
        named = {key for keys in self.names.values() for key in keys}
        num_bytes = sum(kept.bytes_on_disk for kept in self.states.values())
        for key, kept in list(self.states.items()):
            if kept.bytes_on_disk and num_bytes > self.disk_bytes and key not in named:
                gone = self._state_path(key)
                remove_folder(gone.rename(gone.with_name(f".unfinished-{gone.name}")))  # never half a state
                num_bytes, kept.bytes_on_disk = num_bytes - kept.bytes_on_disk, 0
            if kept.state is None and not kept.bytes_on_disk:
                del self.states[key]


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
