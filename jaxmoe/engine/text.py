"""Text of a request as its tokens come, ended by stop texts."""

from collections.abc import Sequence

from jaxmoe.tokenizer import TextStream


class StoppableText:
    """Text that is held back while it could be the beginning of a stop text.

    Args:
      stream: the tokenizer's decoder.
      stop: texts at which to end.
    """

    def __init__(self, stream: TextStream, stop: Sequence[str]):
        self._stream, self._stop = stream, tuple(stop)
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is certain now. Sets ``stopped`` once a stop text has appeared."""
        return self._release(self._stream.step(token), last=False)

    def end(self) -> str:
        """The rest, when no more tokens come."""
        return self._release(self._stream.end(), last=True)

    def _release(self, piece: str, *, last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + piece
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = (
            0 if last else max(map(self._overlap, [text] * len(self._stop), self._stop), default=0)
        )
        split = len(text) - keep
        self._held = text[split:]
        return text[:split]

    @staticmethod
    def _overlap(text: str, stop: str) -> int:
        """Length of the longest end of ``text`` that begins ``stop``."""
        for size in range(min(len(stop) - 1, len(text)), 0, -1):
            if stop.startswith(text[-size:]):
                return size
        return 0
