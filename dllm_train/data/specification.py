"""Dataset specification strings, such as `0.7*org/chat[train:5000,test:100] + 0.3*"my files/extra.jsonl"`.

    specification = term, { "+", term }
    term          = [ weight, "*" ], name, [ ":", configuration ], [ "[", entry, { ",", entry }, "]" ]
    entry         = split, [ ":", count ]  |  field, ":", value
    name, configuration, split, field, value = word | quoted

A word is any run of characters other than white space and `+ * : , [ ] "`; anything else is written in double
quotes, with `\\` before a quote or a backslash. A weight is a positive number; a count is a positive integer
and may hold underscores. An entry whose value is no count keeps the rows whose field has that value; quote a
value that looks like a count.
"""

import re
from dataclasses import dataclass

_WORD = re.compile(r'[^\s+*:,\[\]"]+')
_QUOTED = re.compile(r'"((?:[^"\\]|\\["\\])*)"')
_WEIGHT = re.compile(r"([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*\*")
_COUNT = re.compile(r"-?\d[\d_]*")


@dataclass(frozen=True)
class Source:
    """One term of a specification.

    name: a path or a hub name. configuration: of a hub dataset.
    splits: (split, rows or None for all of them); empty: the splits that there are.
    filters: (field, value), all of which a row must match.
    weight: its share of a mixture, relative to the other weights; None: the sources are concatenated.
    """

    name: str
    configuration: str | None = None
    splits: tuple[tuple[str, int | None], ...] = ()
    filters: tuple[tuple[str, str], ...] = ()
    weight: float | None = None

    def __str__(self) -> str:
        entries = [_quote(s) if n is None else f"{_quote(s)}:{n}" for s, n in self.splits]
        entries += [f"{_quote(field)}:{_quote(value, of_filter=True)}" for field, value in self.filters]
        return (
            ("" if self.weight is None else f"{self.weight!r}*")
            + _quote(self.name)
            + ("" if self.configuration is None else f":{_quote(self.configuration)}")
            + (f"[{','.join(entries)}]" if entries else "")
        )


def parse_specification(text: str) -> tuple[Source, ...]:
    """Return the sources that `text` names; raise ValueError that points at the first wrong character."""
    if not isinstance(text, str):
        raise TypeError(f"dataset is a {type(text).__name__}; expected a specification string")
    return _Parser(text).specification()


def format_specification(sources: tuple[Source, ...]) -> str:
    """Return the string that `parse_specification` reads as `sources`."""
    return "+".join(map(str, sources))


class _Parser:
    """A recursive-descent parser over one string; `at` is the next character."""

    def __init__(self, text: str):
        self.text, self.at = text, 0

    def specification(self) -> tuple[Source, ...]:
        starts, sources = [], []
        while True:
            self._skip_space()
            starts.append(self.at)
            sources.append(self._term())
            if self.at == len(self.text):
                break
            self._expect("+", "'+' and another dataset, or the end")
        weighted = [source.weight is not None for source in sources]
        if any(weighted) and not all(weighted):
            self.at = starts[weighted.index(False)]
            raise self._error("a weight, since another dataset has one")
        return tuple(sources)

    def _term(self) -> Source:
        weight = None
        if match := _WEIGHT.match(self.text, self.at):
            weight = float(match[1])
            if not 0 < weight < float("inf"):
                raise self._error("a positive weight")
            self.at = match.end()
        name = self._string("the name of a dataset")
        configuration = self._string("the name of a configuration") if self._take(":") else None
        splits: list[tuple[str, int | None]] = []
        filters: list[tuple[str, str]] = []
        if self._take("["):
            self._entry(splits, filters)
            while self._take(","):
                self._entry(splits, filters)
            self._expect("]", "',' or ']'")
        return Source(name, configuration, tuple(splits), tuple(filters), weight)

    def _entry(self, splits: list, filters: list) -> None:
        self._skip_space()
        start = self.at
        name = self._string("a split or a field")
        if not self._take(":"):
            count = None
        else:
            self._skip_space()
            quoted = self.text.startswith('"', self.at)
            place, value = self.at, self._string("a count of rows, or the value of a field")
            if quoted or not _COUNT.fullmatch(value):
                filters.append((name, value))
                return
            count = int(value)
            if count < 1:
                self.at = place
                raise self._error("a positive count of rows")
        if any(name == other for other, _ in splits):
            self.at = start
            raise self._error(f"each split once; {name!r} is there twice")
        splits.append((name, count))

    def _string(self, expected: str) -> str:
        self._skip_space()
        if match := _QUOTED.match(self.text, self.at):
            value = re.sub(r"\\(.)", r"\1", match[1])
            if not value:
                raise self._error(expected)
        elif match := _WORD.match(self.text, self.at):
            value = match[0]
        else:
            raise self._error(expected)
        self.at = match.end()
        self._skip_space()
        return value

    def _take(self, character: str) -> bool:
        found = self.text.startswith(character, self.at)
        if found:
            self.at += 1
            self._skip_space()
        return found

    def _expect(self, character: str, expected: str) -> None:
        if not self._take(character):
            raise self._error(expected)

    def _skip_space(self) -> None:
        while self.at < len(self.text) and self.text[self.at].isspace():
            self.at += 1

    def _error(self, expected: str) -> ValueError:
        found = repr(self.text[self.at]) if self.at < len(self.text) else "the end"
        return ValueError(
            f"dataset specification, position {self.at}: expected {expected}, found {found}\n"
            f"  {self.text}\n  {' ' * self.at}^"
        )


def _quote(text: str, of_filter: bool = False) -> str:
    """Return `text` as a word where that reads as the same string, else in quotes."""
    if _WORD.fullmatch(text) and not (of_filter and _COUNT.fullmatch(text)):
        return text
    return '"' + re.sub(r'(["\\])', r"\\\1", text) + '"'
