"""Media that has been seen before, by the hash of its bytes: headers, and media tokens as the LLM gets them."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace

from torch import Tensor

from mmchat.conversation import MediaHeader, Modality

# The header counts as much as this in the cache's bytes, so that items without tokens are bounded too.
_HEADER_BYTES = 1024


def digest_of(modality: Modality, data: bytes) -> bytes:
    """What stands for an item everywhere: its bytes, and what they are taken for."""
    return hashlib.sha256(modality.encode() + b"\0" + data).digest()


@dataclass(frozen=True)
class CachedMedia:
    """header: of the file; tokens [tokens, dim]: of its encoder and connector, None as long as nobody needed them."""

    header: MediaHeader
    tokens: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        return _HEADER_BYTES + (0 if self.tokens is None else self.tokens.nbytes)


class MediaCache:
    """Least recently used items go first; any thread may ask."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_bytes = 0
        self._lock = threading.Lock()
        self._items: OrderedDict[bytes, CachedMedia] = OrderedDict()

    def get(self, digest: bytes) -> CachedMedia | None:
        with self._lock:
            found = self._items.get(digest)
            if found is not None:
                self._items.move_to_end(digest)
            return found

    def put(self, digest: bytes, header: MediaHeader, tokens: Tensor | None = None) -> None:
        """Keeps an item; tokens that are known already stay."""
        with self._lock:
            item = CachedMedia(header, tokens)
            before = self._items.pop(digest, None)
            if before is not None:
                self.num_bytes -= before.num_bytes
                item = replace(item, tokens=before.tokens if tokens is None else tokens)
            self._items[digest] = item
            self.num_bytes += item.num_bytes
            while self.num_bytes > self.max_bytes:
                self.num_bytes -= self._items.popitem(last=False)[1].num_bytes
