"""Python sources as training data: collection, document split, and rows cut from one token stream."""

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dllm_train.recipes.tiny_python import arithmetic
from dllm_train.recipes.tiny_python.tokenizer import newline_ids

EXCLUDED_PARTS = {
    "test",
    "tests",
    "idle_test",
    "idlelib",
    "lib2to3",
    "site-packages",
    "dist-packages",
    "__pycache__",
    "turtledemo",
    "ensurepip",
    "pydoc_data",
}
GENERATED = re.compile(r"^encodings/(cp\d|iso8859|mac_|koi8|kz1048|ptcp154|hp_roman8|palmos|tis_620)")
MAX_BYTES = 300_000


@dataclass(frozen=True)
class Document:
    """A source file: its path relative to the library it comes from, and its text."""

    path: str
    text: str


def collect_sources(root: Path | str | None = None) -> list[Document]:
    """Return Python files below `root`, sorted by path; None: the standard library of the running Python.

    Left out: tests, demonstration and grammar data, generated character tables, files that are not UTF-8
    or exceed 300 kB.
    """
    root = Path(root or sysconfig.get_paths()["stdlib"])
    if not root.is_dir():
        raise ValueError(f"root is {str(root)!r}, which is not a directory")
    documents = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).as_posix()
        if EXCLUDED_PARTS & set(relative.split("/")) or GENERATED.match(relative):
            continue
        data = path.read_bytes()
        if 0 < len(data) <= MAX_BYTES:
            try:
                documents.append(Document(relative, data.decode("utf-8").replace("\r\n", "\n")))
            except UnicodeDecodeError:
                continue
    return sorted(documents, key=lambda document: document.path)


def is_held_out(path: str, one_in: int = 20) -> bool:
    """Return whether a document belongs to the held-out part, by a hash of its relative path."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % one_in == 0


def split(documents: list[Document], one_in: int = 20) -> tuple[list[Document], list[Document]]:
    """Return (train, held out), disjoint by path; a document equal to a held-out one is in neither part."""
    held_out = [d for d in documents if is_held_out(d.path, one_in)]
    texts = {d.text for d in held_out}
    return [d for d in documents if not is_held_out(d.path, one_in) and d.text not in texts], held_out


def digest(documents: list[Document]) -> str:
    """Return the sha256 of paths and texts, which names the corpus in a model card."""
    sha = hashlib.sha256()
    for document in documents:
        sha.update(document.path.encode() + b"\0" + document.text.encode() + b"\0")
    return sha.hexdigest()


def encode_documents(documents: list[Document], tokenizer) -> list[np.ndarray]:
    """Return int32 ids of every document, each ended by the end token."""
    if not documents:
        raise ValueError("documents is empty")
    ids = tokenizer([d.text for d in documents], add_special_tokens=False)["input_ids"]
    return [np.array([*row, tokenizer.eos_token_id], dtype=np.int32) for row in ids]


class Rows:
    """Training rows by index, each drawn from (seed, index) alone, so that a resumed run sees the same rows.

    A row starts at the beginning of a line of the shuffled documents' stream; the places of consecutive rows
    are spread evenly over the stream (multiples of the golden ratio). Documents of additions precede the
    code, as many as make `arithmetic_share` of all tokens.
    """

    def __init__(
        self, documents: list[np.ndarray], tokenizer, *, seed: int = 0, arithmetic_share: float = 0.12
    ):
        if not documents:
            raise ValueError("documents is empty")
        if not 0 <= arithmetic_share < 1:
            raise ValueError(f"arithmetic_share is {arithmetic_share}; expected 0 <= share < 1")
        self.tokenizer, self.seed = tokenizer, seed
        rng = np.random.default_rng([seed, 0])
        self.stream = np.concatenate([documents[i] for i in rng.permutation(len(documents))])
        self.line_starts = np.concatenate([[0], np.flatnonzero(ends_line(tokenizer)[self.stream[:-1]]) + 1])
        self.documents_per_token = arithmetic_share / self._tokens_per_arithmetic_document()

    def row(self, index: int, length: int) -> np.ndarray:
        """Return int32 [length]."""
        rng = np.random.default_rng([self.seed, 1, index])
        parts = [
            self._arithmetic_document(rng) for _ in range(rng.poisson(self.documents_per_token * length))
        ]
        left = length - sum(map(len, parts))
        if left > 0:
            place = int(len(self.stream) * ((index + 1) * 0.6180339887498949 % 1))
            start = self.line_starts[np.searchsorted(self.line_starts, place, side="right") - 1]
            parts.append(np.take(self.stream, np.arange(start, start + left), mode="wrap"))
        return np.concatenate(parts)[:length]

    def batch(self, first: int, rows: int, length: int) -> np.ndarray:
        """Return int64 [rows, length]: rows `first` .. `first + rows - 1`."""
        return np.stack([self.row(first + i, length) for i in range(rows)]).astype(np.int64)

    def _arithmetic_document(self, rng) -> np.ndarray:
        ids = self.tokenizer(arithmetic.document(rng), add_special_tokens=False)["input_ids"]
        return np.array([*ids, self.tokenizer.eos_token_id], dtype=np.int32)

    def _tokens_per_arithmetic_document(self) -> float:
        rng = np.random.default_rng([self.seed, 2])
        texts = [arithmetic.document(rng) for _ in range(1000)]
        ids = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        return sum(map(len, ids)) / len(ids) + 1


def ends_line(tokenizer) -> np.ndarray:
    """Return bool [V]: tokens after which a line begins (newline runs and the end token)."""
    ends = np.zeros(len(tokenizer), dtype=bool)
    ends[newline_ids(tokenizer)] = True
    ends[tokenizer.eos_token_id] = True
    return ends
