"""Pages of the cache: who holds which, and which already hold the beginning of a new prompt.

Full pages of computed tokens are nodes of a radix tree: a node's path spells the tokens before it, so two requests
whose prompts begin alike share pages. Rows of different kinds (weights read at another width) have trees of their own. A page is *held* while a request counts on it, *idle* while only the tree
remembers it (the oldest idle pages are reused first), and *free* otherwise.
"""

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence

from jaxmoe.errors import JaxMoeError


class PageLeak(JaxMoeError):
    """Page accounting is broken: a page was released that nobody held."""


class _Node:
    """A full page of tokens after the tokens of its ancestors."""

    __slots__ = ("children", "page", "parent", "tokens")

    def __init__(self, parent: "_Node | None", tokens: tuple[int, ...], page: int):
        self.parent, self.tokens, self.page = parent, tokens, page
        self.children: dict[tuple[int, ...], _Node] = {}


class PagePool:
    """The pages of one rank. Host-side bookkeeping only: rows live in the cache's arrays.

    Args:
      pages: how many pages there are.
      page_size: tokens per page.
      reuse: whether finished requests' pages may serve later prompts that begin alike.
    """

    def __init__(self, pages: int, page_size: int, *, reuse: bool = True):
        if pages < 1 or page_size < 1:
            raise ValueError(f"pages and page_size must be >= 1; got {pages} and {page_size}.")
        self.pages, self.page_size, self.reuse = pages, page_size, reuse
        self._free = list(range(pages - 1, -1, -1))
        self._holders = [0] * pages
        self._roots: dict[Hashable, _Node] = {}
        self._node_of: dict[int, _Node] = {}
        # Oldest first. A page's descendants are released before it, so the oldest idle page is always a leaf.
        self._idle: OrderedDict[int, _Node] = OrderedDict()

    @property
    def available(self) -> int:
        """Pages that ``allocate`` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def held(self) -> int:
        """Pages that some request counts on."""
        return self.pages - self.available

    @property
    def idle(self) -> int:
        """Pages kept only because a later prompt may begin with what they hold."""
        return len(self._idle)

    def _root(self, kind: Hashable) -> _Node:
        return self._roots.setdefault(kind, _Node(None, (), -1))

    def _path(self, tokens: Sequence[int], kind: Hashable) -> Iterator[int]:
        """Pages that contain the longest beginning of ``tokens``, but never all of them."""
        node, size = self._root(kind), self.page_size
        for start in range(0, len(tokens) - size, size):
            node = node.children.get(tuple(tokens[start : start + size]))
            if node is None:
                return
            yield node.page

    def known(self, tokens: Sequence[int], kind: Hashable = None) -> int:
        """How many of ``tokens`` ``match`` would find."""
        return sum(self.page_size for _ in self._path(tokens, kind))

    def match(self, tokens: Sequence[int], kind: Hashable = None) -> list[int]:
        """Holds and returns the pages that already contain the longest beginning of ``tokens``, in rows of this kind.

        Whole pages only, and never all of ``tokens``: the last token must still be computed, for its logits.
        """
        pages = list(self._path(tokens, kind))
        for page in pages:
            self._hold(page)
        return pages

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages held by the caller, or None (and nothing held) if there are not so many."""
        if count > self.available:
            return None
        while len(self._free) < count:
            self._forget_oldest()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def publish(self, tokens: Sequence[int], pages: Sequence[int], kind: Hashable = None) -> None:
        """Lets later prompts find ``pages``, which hold the rows of ``tokens``; a last, partly filled page is passed over.

        Where the same tokens are already known under another page, that one stays.
        """
        if not self.reuse:
            return
        node, size = self._root(kind), self.page_size
        for i in range(len(tokens) // size):
            key = tuple(tokens[i * size : (i + 1) * size])
            child = node.children.get(key)
            if child is None:
                if pages[i] in self._node_of:
                    return
                child = node.children[key] = _Node(node, key, pages[i])
                self._node_of[pages[i]] = child
            elif child.page != pages[i]:
                return  # below another request's page ours would outlive its parent
            node = child

    def release(self, pages: Sequence[int]) -> None:
        """Gives up one hold on each page.

        Raises:
          PageLeak: if a page is not held.
        """
        for page in reversed(pages):
            if self._holders[page] < 1:
                raise PageLeak(f"page {page} was released but nobody held it; please report this.")
            self._holders[page] -= 1
            if self._holders[page]:
                continue
            node = self._node_of.get(page)
            if node is None:
                self._free.append(page)
            else:
                self._idle[page] = node

    def forget(self) -> None:
        """Frees all idle pages, e.g. because the weights have changed."""
        while self._idle:
            self._forget_oldest()

    def _hold(self, page: int) -> None:
        self._holders[page] += 1
        self._idle.pop(page, None)

    def _forget_oldest(self) -> None:
        page, node = self._idle.popitem(last=False)
        del node.parent.children[node.tokens]
        del self._node_of[page]
        self._free.append(page)
