"""Tokens in, text out, piece by piece: whole characters, as soon as it is certain that they belong to the text."""

from __future__ import annotations

from collections.abc import Iterable

from fastgpt2.gpt2.data.tokenizer import Tokenizer


class Pieces:
    """The text that follows a prompt. What `add` and `finish` return makes up `text`.

    stop: the text ends before this string, wherever tokens split it. It also ends before the tokenizer's end of text.
    prompt: the tokens before the text: a vocabulary may leave out the space before a text's first word.
    tokens: how many were added before it ended, with the one that ended it. ended: None, "end_of_text" or "stop".
    """

    def __init__(self, tokenizer: Tokenizer, stop: str | None = None, prompt: Iterable[int] = ()):
        if stop == "":
            raise ValueError("stop is empty: give at least one character, or None")
        self.text = ""
        self.tokens = 0
        self.ended: str | None = None
        self._end_of_text = tokenizer.end_of_text
        self._decode = tokenizer.detokenizer(prompt)
        self._stop = stop
        self._held = ""  # may be the beginning of `stop`

    def add(self, token: int) -> str:
        """The next piece, often empty. Tokens after the end are ignored."""
        if self.ended:
            return ""
        self.tokens += 1
        if token == self._end_of_text:
            piece = self.finish()
            self.ended = self.ended or "end_of_text"
            return piece
        return self._release(self._decode([token], False), final=False)

    def finish(self) -> str:
        """The last piece, when no token follows."""
        return "" if self.ended else self._release(self._decode([], True), final=True)

    def _release(self, new: str, final: bool) -> str:
        piece, self._held = self._held + new, ""
        if self._stop:
            at = piece.find(self._stop)
            if at >= 0:
                piece, self.ended = piece[:at], "stop"
            elif not final:
                longest = min(len(self._stop) - 1, len(piece))
                held = next((n for n in range(longest, 0, -1) if piece.endswith(self._stop[:n])), 0)
                piece, self._held = piece[: len(piece) - held], piece[len(piece) - held :]
        self.text += piece
        return piece
