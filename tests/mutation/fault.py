"""What a planted fault is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Fault:
    """One change to one file that makes the library wrong, and the tests that have to notice."""

    name: str
    file: str  # from the root of the checkout
    before: str  # occurs in the file exactly once
    after: str
    tests: tuple[str, ...]  # what pytest is given
    why: str  # the bug that it stands for
    needs: str = ""  # the processor's feature without which the tests skip

    def plant(self, text: str) -> str:
        """The file's text with the fault in it.

        Raises:
            ValueError: the text has `before` not once, or the fault changes nothing.
        """
        count = text.count(self.before)
        if count != 1:
            raise ValueError(f"{self.name}: found {count} times in {self.file}, expected once")
        if self.before == self.after:
            raise ValueError(f"{self.name}: changes nothing")
        return text.replace(self.before, self.after)
