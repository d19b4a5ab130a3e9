"""
Which pages of the KV cache are free, which sequence holds which, and which hold tokens that several begin with.

In: the tokens of sequences. Out: page numbers. Plain Python without torch; `Scheduler` calls it, and `ModelRunner`
only writes where it says.

Shared pages. A full page whose tokens, and all before them, are known has a key: a hash of its tokens and of the key
    of the page before. A sequence that begins with the same tokens holds the same page and computes only the rest.
    Nobody writes into it again, because a sequence writes behind its last cached token alone.
Kept pages. A shared page that no sequence holds stays until memory is needed; the longest unused goes first, and of
    one sequence the last.
Page 0 is nobody's: a decode step also computes slots without a sequence, and writes their token there.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

from utils.common.numbers import ceil_div

PAGE_TOKENS = 64  # tokens that the decode kernel loads at a time
UNLIMITED_PAGES = 1 << 40  # of a scheduler without a device
SCRATCH_PAGE = 0


def pages_for(tokens: int) -> int:
    """Return how many pages hold `tokens`."""
    return ceil_div(tokens, PAGE_TOKENS)


@dataclass
class HeldPages:
    """
    The pages of one sequence, in the order of its tokens.

    Args:
        keys: of the first pages, as many as have one.
        filled: tokens that are cached, or will be once the plans so far have run.
    """

    pages: list[int]
    keys: list[bytes]
    filled: int


@dataclass
class PagePool:
    """
    All pages of a cache.

    Args:
        total: pages, page 0 included.
        shares: whether sequences that begin alike may hold the same pages.
    """

    total: int = UNLIMITED_PAGES
    shares: bool = True
    fresh: int = SCRATCH_PAGE + 1  # the first page that was never given out
    free: list[int] = field(default_factory=list)
    holders: dict[int, int] = field(default_factory=dict)  # page -> number of sequences that hold it
    page_of: dict[bytes, int] = field(default_factory=dict)
    key_of: dict[int, bytes] = field(default_factory=dict)
    unused: OrderedDict[int, None] = field(default_factory=OrderedDict)  # pages with a key that nobody holds

    @property
    def available(self) -> int:
        """Pages that can be given out."""
        return self.total - self.fresh + len(self.free) + len(self.unused)

    def hold(self, tokens: Sequence[int], adapter: int, reserve: int) -> HeldPages | None:
        """
        Return pages for all of `tokens`, those shared that exist already; None if there are not enough.

        Args:
            adapter: number of the adapter that computes keys and values.
            reserve: pages that must stay available.
        """
        keys = page_keys(tokens, adapter) if self.shares else []
        shared = []
        for key in keys:
            if key not in self.page_of:
                break
            shared.append(self.page_of[key])
        for page in shared:
            self.holders[page] = self.holders.get(page, 0) + 1
            self.unused.pop(page, None)
        held = HeldPages(shared, keys[: len(shared)], len(shared) * PAGE_TOKENS)
        missing = pages_for(len(tokens)) - len(shared)
        if missing + reserve > self.available:
            self.release(held)
            return None
        self.extend(held, missing)
        return held

    def extend(self, held: HeldPages, count: int) -> list[int]:
        """Give a sequence `count` more pages, which must be available, and return them."""
        pages = []
        for _ in range(count):
            if self.free:
                page = self.free.pop()
            elif self.fresh < self.total:
                page, self.fresh = self.fresh, self.fresh + 1
            else:
                page, _ = self.unused.popitem(last=False)
                del self.page_of[self.key_of.pop(page)]
            self.holders[page] = 1
            pages.append(page)
        held.pages.extend(pages)
        return pages

    def publish(self, held: HeldPages, tokens: Sequence[int], adapter: int) -> None:
        """Let later sequences share the pages that `tokens`, the cached ones of this sequence, fill."""
        if not self.shares:
            return
        for key in page_keys(tokens, adapter, held.keys):
            page = held.pages[len(held.keys)]
            held.keys.append(key)
            if key not in self.page_of:  # else another sequence computed the same at the same time
                self.page_of[key], self.key_of[page] = page, key

    def release(self, held: HeldPages) -> None:
        """Take a sequence's pages back."""
        for page in reversed(held.pages):
            self.holders[page] -= 1
            if self.holders[page]:
                continue
            del self.holders[page]
            if page in self.key_of:
                self.unused[page] = None
            else:
                self.free.append(page)


def page_keys(tokens: Sequence[int], adapter: int, known: Sequence[bytes] = ()) -> list[bytes]:
    """
    Return the keys of the full pages of `tokens` behind those whose keys are `known`.

    A key is a hash of 128 bits: two different beginnings with the same one are not to be expected.
    """
    keys = []
    parent = known[-1] if known else adapter.to_bytes(8, "little")
    for start in range(len(known) * PAGE_TOKENS, len(tokens) - PAGE_TOKENS + 1, PAGE_TOKENS):
        page = array("q", tokens[start : start + PAGE_TOKENS]).tobytes()
        parent = hashlib.blake2b(parent + page, digest_size=16).digest()
        keys.append(parent)
    return keys
