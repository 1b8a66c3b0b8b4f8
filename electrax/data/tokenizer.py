"""Text <-> token ids, over the `tokenizers` and `sentencepiece` libraries."""

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, SupportsInt

from electrax.config import AnyPath, UserError
from electrax.data.outside import read_bytes
from electrax.storage import path_of, write_atomically

# For each role the names in use, best first. The order is also the order of ids in a vocabulary trained here.
SPECIAL_NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "unk": ("[UNK]", "<unk>"),
    "cls": ("[CLS]", "<s>", "<cls>"),
    "sep": ("[SEP]", "</s>", "<sep>"),
    "mask": ("[MASK]", "<mask>"),
}
SPECIALS = [names[0] for names in SPECIAL_NAMES.values()]
LONGEST_WORD = 200  # characters, the reference's
MAX_TOKENIZER_BYTES = 256 << 20  # of one with 250,000 tokens, 20 MB
LARGEST_VOCABULARY = 1 << 24  # a table of embeddings has a row for each number
KINDS = ("wordpiece", "bpe", "unigram", "sentencepiece-bpe")
HUGGING_FACE_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE = "tokenizer.json", "tokenizer.model", "vocab.txt"

Encoded = tuple[list[int], list[tuple[int, int]]]


def is_kind(wanted: str, key: str = "tokenizer") -> bool:
    """Whether a setting names a kind to train, not a tokenizer that is there. Raises UserError where it is neither."""
    if wanted in KINDS:
        return True
    if not path_of(wanted).exists():
        raise UserError(f"{key}: expected one of {', '.join(KINDS)} or a path, not {wanted!r}")
    return False


class Tokenizer:
    """One interface to a `tokenizers.Tokenizer` or a `sentencepiece.SentencePieceProcessor`.

    Special tokens are found by name and are never added to, nor produced by, encoded text. `sha256` is the hash of the
    bytes `save` writes, so it survives saving and loading under any version of the libraries.
    """

    def __init__(self, backend: Any, serialized: bytes, source: str):
        self._backend, self._serialized = backend, serialized
        self._sentencepiece = not hasattr(backend, "encode_batch_fast")
        self.sha256 = hashlib.sha256(serialized).hexdigest()
        if self._sentencepiece:
            vocabulary = {backend.id_to_piece(i): i for i in range(backend.get_piece_size())}
        else:
            vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        if self.vocab_size > LARGEST_VOCABULARY:
            raise UserError(f"{source}: expected token numbers below {LARGEST_VOCABULARY:,}")
        found = {role: next((n for n in names if n in vocabulary), None) for role, names in SPECIAL_NAMES.items()}
        missing = [" or ".join(SPECIAL_NAMES[role]) for role, name in found.items() if name is None]
        if missing:
            raise UserError(f"{source}: the vocabulary has no {', no '.join(missing)}")
        self.special_ids = {role: vocabulary[name] for role, name in found.items()}
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = self.special_ids.values()
        self._special = {name: vocabulary[name] for name in found.values()}
        # Some foreign vocabularies hold special tokens as ordinary pieces, so that text can spell them.
        self._forbidden = set(self.special_ids.values()) - {self.unk_id}
        self._leaks = any(not self._forbidden.isdisjoint(self._offsets(name)[0]) for name in self._special)

    @staticmethod
    def load(
        path: str | AnyPath,
        lowercase: bool | None = True,
        strip_accents: bool | None = None,
        longest_word: int = LONGEST_WORD,
    ) -> "Tokenizer":
        """Read `vocab.txt` (BERT's WordPiece), `tokenizer.json`, a SentencePiece `.model`, or a directory with one.

        `lowercase` (None: where the vocabulary has no capitals), `strip_accents` (None: as lowercase) and
        `longest_word` (characters; one beyond is [UNK]) apply to a `.txt` vocabulary only; the others carry theirs.
        """
        path = path_of(path)
        if path.is_dir():
            names = (HUGGING_FACE_FILE, SENTENCEPIECE_FILE, VOCABULARY_FILE)
            found = next((path / name for name in names if (path / name).exists()), None)
            if found is None:
                raise UserError(f"{path}: expected one of {', '.join(names)} in it")
            path = found
        try:
            data = read_bytes(path, MAX_TOKENIZER_BYTES)
        except UserError as error:
            raise UserError(f"{error}; expected a tokenizer") from None
        match path.suffix:
            case ".json":
                return _from_json(data, str(path))
            case ".model":
                return _from_model(data, str(path))
            case ".txt":
                vocabulary = _read_vocabulary(data, path)
                lowercase = not _has_capitals(vocabulary) if lowercase is None else lowercase
                return _from_json(_wordpiece(vocabulary, lowercase, strip_accents, longest_word), str(path))
        raise UserError(f"{path}: expected a tokenizer file ending in .json, .model or .txt")

    @staticmethod
    def load_completed(path: str | Path) -> tuple["Tokenizer", int]:
        """A `tokenizer.json`, or that of a directory, with the special tokens that it lacks behind its others, and how
        many these are. Text is encoded as before."""
        path = Path(path) / HUGGING_FACE_FILE if Path(path).is_dir() else Path(path)
        try:
            backend = _backend(read_bytes(path, MAX_TOKENIZER_BYTES).decode("utf-8", errors="replace"), str(path))
        except UserError as error:
            raise UserError(f"{error}; expected a tokenizer.json") from None
        known = backend.get_vocab(with_added_tokens=True)
        missing = [names[0] for names in SPECIAL_NAMES.values() if known.keys().isdisjoint(names)]
        backend.add_special_tokens(missing)
        return _from_json(backend.to_str(), str(path)), len(missing)

    @staticmethod
    def train(
        kind: str, lines: Iterable[str], vocab_size: int, lowercase: bool = True, strip_accents: bool | None = None
    ) -> "Tokenizer":
        """Train one of KINDS; the same lines give the same bytes. `wordpiece` reads `lines` twice (not an iterator)."""
        match kind:
            case "wordpiece":
                return _train_wordpiece(lines, vocab_size, lowercase, strip_accents)
            case "bpe":
                return _train_bpe(lines, vocab_size)
            case "unigram" | "sentencepiece-bpe":
                return _train_sentencepiece(kind.removeprefix("sentencepiece-"), lines, vocab_size)
        raise UserError(f"tokenizer: expected one of {', '.join(KINDS)} or a path, not {kind!r}")

    @property
    def file_name(self) -> str:
        """Of what `save` writes."""
        return SENTENCEPIECE_FILE if self._sentencepiece else HUGGING_FACE_FILE

    def save(self, directory: str | AnyPath) -> AnyPath:
        """Write tokenizer.json or tokenizer.model into `directory`, all or nothing; returns the file."""
        path = path_of(directory) / self.file_name
        write_atomically(path, self._serialized)
        return path

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; "[MASK]" and its like are ordinary text."""
        if self._leaks:
            return [self._plain(text)[0] for text in texts]
        if self._sentencepiece:
            return self._backend.encode(texts)
        return [e.ids for e in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode(self, text: str, allow_special: bool = False) -> Encoded:
        """Ids and their (start, end) characters in `text`; `allow_special` recognises "[MASK]" and its like."""
        if not allow_special:
            return self._plain(text)
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        end = 0
        for match in re.finditer("|".join(map(re.escape, self._special)), text):
            _extend(ids, offsets, self._plain(text[end : match.start()].rstrip()), end)
            ids.append(self._special[match[0]])
            offsets.append(match.span())
            end = match.end()
        _extend(ids, offsets, self._plain(text[end:]), end)
        return ids, offsets

    def decode(self, ids: Iterable[SupportsInt]) -> str:
        """The text of `ids`, special tokens left out."""
        ordinary = [int(i) for i in ids if int(i) not in self._forbidden]
        text = self._backend.decode(ordinary) if self._sentencepiece else self._backend.decode(ordinary, False)
        return text.removeprefix(" ")  # the space byte-level BPE puts before the first word

    def pieces(self, ids: Iterable[SupportsInt]) -> list[str]:
        """The vocabulary's name of each id."""
        name = self._backend.id_to_piece if self._sentencepiece else self._backend.id_to_token
        return [name(int(i)) for i in ids]

    def _plain(self, text: str) -> Encoded:
        ids, offsets = self._offsets(text)
        if self._leaks:
            leak = next((k for k, i in enumerate(ids) if i in self._forbidden), None)
            if leak is not None:  # cut the name after its first character, so that it is no longer one
                cut = min(offsets[leak][0] + 1, len(text) - 1)
                ids, offsets = [], []
                if cut > 0:
                    _extend(ids, offsets, self._plain(text[:cut]), 0)
                    _extend(ids, offsets, self._plain(text[cut:]), cut)
        return ids, offsets

    def _offsets(self, text: str) -> Encoded:
        if self._sentencepiece:
            encoded = self._backend.encode_as_offset_mapping(text)
            ids, spans = encoded["ids"], encoded["offsets"]
        else:
            encoding = self._backend.encode(text, add_special_tokens=False)
            ids, spans = encoding.ids, encoding.offsets
        return list(ids), [_trim(text, *span) for span in spans]


def _extend(ids: list[int], offsets: list[tuple[int, int]], more: Encoded, shift: int) -> None:
    ids += more[0]
    offsets += [(start + shift, end + shift) for start, end in more[1]]


def _trim(text: str, start: int, end: int) -> tuple[int, int]:
    """Leave out the space before a word, which byte-level BPE and SentencePiece count to the word."""
    while start < end and text[start].isspace():
        start += 1
    return start, end


def _backend(text: str, source: str) -> Any:
    from tokenizers import Tokenizer as HuggingFace

    try:
        return HuggingFace.from_str(text)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{source}: not a tokenizer.json ({error})") from None


def _from_json(data: bytes | str, source: str) -> Tokenizer:
    text = data if isinstance(data, str) else data.decode("utf-8", errors="replace")
    backend = _backend(text, source)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True
    try:
        backend.encode("\U000f0000")  # for private use, so that an unknown token is needed
        return Tokenizer(backend, text.encode(), source)
    except UserError:
        raise
    except Exception as error:  # as bare
        raise UserError(f"{source}: cannot encode text ({error})") from None


def _from_model(data: bytes, source: str) -> Tokenizer:
    from sentencepiece import SentencePieceProcessor

    backend = SentencePieceProcessor()
    try:
        backend.load_from_serialized_proto(data)
    except RuntimeError:
        raise UserError(f"{source}: not a SentencePiece model") from None
    return Tokenizer(backend, data, source)


def _read_vocabulary(data: bytes, path: AnyPath) -> dict[str, int]:
    """One token a line, its id the line number from 0."""
    try:
        tokens = data.decode("utf-8").rstrip("\n").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: expected UTF-8 ({error.reason} at byte {error.start})") from None
    vocabulary: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if vocabulary.setdefault(token.rstrip("\r"), i) != i:
            first = vocabulary[token.rstrip("\r")] + 1
            raise UserError(f"{path}, line {i + 1}: the token {token!r} is already in line {first}")
    return vocabulary


def _has_capitals(vocabulary: Iterable[str]) -> bool:
    """Whether lowercased text would never reach a piece, those in brackets ([MASK], [unused7]) aside. Of a letter such
    as ℝ there is no small one: vocabularies of lowercased text have it, too."""
    return any(piece != piece.lower() and not re.fullmatch(r"\[\w+\]", piece) for piece in vocabulary)


def _wordpiece(
    vocabulary: dict[str, int], lowercase: bool, strip_accents: bool | None, longest_word: int = LONGEST_WORD
) -> str:
    """BERT's tokenizer as a tokenizer.json: its normalizer, its splitting at punctuation, greedy WordPiece."""
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    backend = HuggingFace(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=longest_word))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    backend.add_special_tokens([name for name in SPECIALS if name in vocabulary])
    return backend.to_str()


def _train_wordpiece(lines: Iterable[str], vocab_size: int, lowercase: bool, strip_accents: bool | None) -> Tokenizer:
    """The library numbers the "##x" characters in hash order, and ties between merges follow the numbers
    (huggingface/tokenizers#1794). Naming them all beforehand, in order, makes training deterministic.
    """
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    if iter(lines) is lines:
        raise TypeError("wordpiece training reads the lines twice: pass a list or another re-iterable, not an iterator")
    backend = HuggingFace(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=strip_accents)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    alphabet = _alphabet(lines, backend.normalizer.normalize_str, vocab_size // 3)
    # Punctuation and CJK characters are words of their own and so never follow another character.
    words = {c: backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str("a" + c)) for c in alphabet}
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIALS + alphabet + ["##" + c for c in alphabet if len(words[c]) == 1],
        initial_alphabet=alphabet,
        limit_alphabet=len(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    vocabulary = {token: i for token, i in backend.get_vocab().items() if i < vocab_size}
    return _from_json(_wordpiece(vocabulary, lowercase, strip_accents), "the trained tokenizer")


def _alphabet(lines: Iterable[str], normalize: Callable[[str], str], most: int, coverage: float = 0.9999) -> list[str]:
    """The most frequent characters that make up `coverage` of the text; the others would only fill the vocabulary."""
    raw: Counter[str] = Counter()
    for line in lines:
        raw.update(line)
    counts: Counter[str] = Counter()
    for character, count in raw.items():  # one by one: normalizing the whole text takes ten times as long
        for c in normalize(character):
            counts[c] += 0 if c.isspace() else count
    wanted, kept = coverage * counts.total(), []
    for c in sorted(counts, key=lambda c: (-counts[c], c))[:most]:
        if wanted <= 0 or not counts[c]:
            break
        kept.append(c)
        wanted -= counts[c]
    return sorted(kept)


def _train_bpe(lines: Iterable[str], vocab_size: int) -> Tokenizer:
    from tokenizers import Tokenizer as HuggingFace
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = HuggingFace(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(lines, trainer)
    return _from_json(backend.to_str(), "the trained tokenizer")


def _train_sentencepiece(model_type: str, lines: Iterable[str], vocab_size: int) -> Tokenizer:
    import io

    from sentencepiece import SentencePieceTrainer

    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            character_coverage=0.9999,
            max_sentence_length=1 << 24,
            num_threads=4,  # the result depends on it
            hard_vocab_limit=False,
            pad_id=0,
            unk_id=1,
            bos_id=-1,
            eos_id=-1,
            pad_piece="[PAD]",
            unk_piece="[UNK]",
            control_symbols=SPECIALS[2:],
            minloglevel=2,
        )
    except RuntimeError as error:
        raise UserError(f"vocab_size {vocab_size}: SentencePiece cannot train on this text ({error})") from None
    return _from_model(model.getvalue(), "the trained tokenizer")
