r"""Where generated text ends, and its text while it comes: rules on decoded text, not on tokens.

tokens      "Hel"  "lo w"    C3        B6+"r"       "\n#"         "##"
text        Hel    Hello w   Hello w�  Hello wör   Hello wör\n#  Hello wör\n###
shown       Hel    Hello w   Hello w   Hello wör   Hello wör     the same: the stop string "\n###" ends it
"""

from collections.abc import Callable, Sequence

from polyglu.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"
"""What bytes decode to that are no character, or not yet."""


def stop_rule(tokenizer: Tokenizer, stop_strings: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """Rule that ends a row when its decoded text has a stop string, wherever the borders of its tokens lie."""
    if not stop_strings:
        return None
    # Each token is at least one byte, so a stop string that the newest token completes begins within this many tokens.
    window = max(len(stop.encode()) for stop in stop_strings)

    def stop(new_tokens: list[int]) -> bool:
        tail = tokenizer.decode(new_tokens[-window:])
        return any(stop in tail for stop in stop_strings)

    return stop


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """Text before the first stop string."""
    return text[: min((text.index(stop) for stop in stop_strings if stop in text), default=len(text))]


class TextStream:
    """Text of tokens as they come; all pieces together are the decoded text, cut at the first stop string.

    Held back: a character whose bytes are not all there, and an end of the text in which a stop string may begin.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop_strings = tokenizer, stop_strings
        self._before: list[int] = []  # tokens of text that is told, for a decoder may look at the token before
        self._open: list[int] = []  # tokens after them
        self._held = ""
        self._ended = False

    def push(self, token: int) -> str:
        """Text that is certain once the next token is here; may be empty."""
        self._open.append(token)
        text = self._new_text()
        if text.endswith(UNFINISHED):
            return ""
        self._before, self._open = self._open, []
        self._add(text)
        keep = max((_begun(self._held, stop) for stop in self._stop_strings), default=0)
        return self._take(len(self._held) - keep)

    def end(self) -> str:
        """The rest, after the last token."""
        self._add(self._new_text())
        self._open = []
        return self._take(len(self._held))

    def _add(self, text: str) -> None:
        """Hold more text; none behind a stop string."""
        if not self._ended:
            whole = self._held + text
            self._held = cut_at(whole, self._stop_strings)
            self._ended = len(self._held) < len(whole)

    def _new_text(self) -> str:
        told = self._tokenizer.decode(self._before)
        return self._tokenizer.decode([*self._before, *self._open])[len(told) :]

    def _take(self, n: int) -> str:
        text, self._held = self._held[:n], self._held[n:]
        return text


def _begun(text: str, stop: str) -> int:
    """Characters at the end of ``text`` with which ``stop`` may have begun."""
    return max((n for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
