"""Documents from files and from the hub: every format, in pieces, resumed at any batch, and named when damaged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt2.gpt2.data import sources
from fastgpt2.gpt2.data.sources import HubDataset, find_source
from fastgpt2.gpt2.data.tokenizer import BPETokenizer
from fastgpt2.gpt2.data.windows import encode

# Merges that cross a cut in the wrong place.
MERGES = [b"\n\n", b"\n ", b" a", b"a\n", b"\r\n", b"\n\n\n", b"  "]
SPACES = {bytes([b]): b for b in range(256)} | {merged: 256 + i for i, merged in enumerate(MERGES)}
DOCUMENTS = [f"document {i}\n" + "a line of words\n" * (i % 7) for i in range(40)]


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(sources, "PIECE_CHARACTERS", 50)
    monkeypatch.setattr(sources, "READ_BYTES", 7)


def write_parquet(path, documents, rows=4):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"id": list(range(len(documents))), "text": documents})
    pyarrow.parquet.write_table(table, path, row_group_size=rows)


def write_jsonl(path, documents):
    path.write_text("\n".join(json.dumps({"text": d, "url": "x"}) for d in documents) + "\n\n")


def write_texts(path, documents):
    path.mkdir()
    for i, document in enumerate(documents):
        (path / f"{i:03}.txt").write_text(document)


WRITERS = {"texts": write_texts, "rows.jsonl": write_jsonl, "rows.parquet": write_parquet}


def from_hub(monkeypatch, folder):
    """The hub's data set, its files lying in `folder`, read by the real `datasets`."""
    import datasets

    datasets.disable_progress_bars()
    load = datasets.load_dataset

    def local(name, config, **how):
        assert name == "HuggingFaceFW/fineweb-edu" and config == "sample-10BT" and how.pop("streaming") is True
        return load("parquet", data_dir=str(folder), streaming=True, **how)

    monkeypatch.setattr(datasets, "load_dataset", local)
    return find_source("fineweb-edu")


# ------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_documents_in_order(tmp_path, name, small_pieces):
    WRITERS[name](tmp_path / name, DOCUMENTS)
    assert list(find_source(tmp_path / name).texts()) == list(find_source(str(tmp_path)).texts()) == DOCUMENTS


def test_a_folder_is_read_by_name_without_what_is_hidden(tmp_path):
    for name, content in {"b.txt": "second", "a/x.md": "first ü", ".git/c": "hidden", "a/.h": "hidden"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content, "utf-8")
    write_jsonl(tmp_path / "c.jsonl", ["third", ""])
    assert list(find_source(tmp_path).texts()) == ["first ü", "second", "third"]
    assert find_source(tmp_path).describe() == {"name": str(tmp_path), "files": 3, "bytes": 70}


def test_a_byte_order_mark_is_no_text(tmp_path, small_pieces):
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbfabc")
    assert list(find_source(tmp_path / "bom.txt").texts()) == ["abc"]


def test_the_hub_streams_the_documents(tmp_path, monkeypatch, small_pieces):
    for i in range(3):
        write_parquet(tmp_path / f"{i}.parquet", DOCUMENTS[i::3])
    source = from_hub(monkeypatch, tmp_path)
    assert list(source.texts()) == DOCUMENTS[::3] + DOCUMENTS[1::3] + DOCUMENTS[2::3]


@pytest.mark.parametrize("name", [*WRITERS, "hub"])
def test_any_batch_can_be_the_first(tmp_path, monkeypatch, small_pieces, name):
    if name == "hub":
        write_parquet(tmp_path / "a.parquet", DOCUMENTS[:25])
        write_parquet(tmp_path / "b.parquet", DOCUMENTS[25:])
        source = from_hub(monkeypatch, tmp_path)
    else:
        WRITERS[name](tmp_path / name, DOCUMENTS)
        source = find_source(tmp_path)
    batches = list(source.batches())
    assert len(batches) > 10
    for i in (0, 1, 7, len(batches) - 1):
        position = json.loads(json.dumps(batches[i][0]))
        assert [pieces for _, pieces in source.batches(position)] == [pieces for _, pieces in batches[i:]]


# -------------------------------------------------------------------------------------------------------- pieces


@given(st.text(st.sampled_from("ab' \n\r\t\x1c\x85.1é"), max_size=60), st.integers(1, 5))
def test_pieces_have_the_tokens_of_the_document(text, size):
    chunks = [text[i : i + size] for i in range(0, len(text), size)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sources, "PIECE_CHARACTERS", 4)
        pieces = list(sources.cut(chunks))
    assert "".join(piece for piece, _ in pieces) == text
    assert [ends for _, ends in pieces] == [False] * (len(pieces) - 1) + [True] * bool(text)
    tokenizer = BPETokenizer(SPACES)
    assert encode(pieces, tokenizer).tolist() == [*tokenizer.encode(text), *[tokenizer.end_of_text] * bool(text)]


def test_long_documents_are_cut(small_pieces):
    pieces = list(sources.cut(["a line of words\n" * 100]))
    assert len(pieces) > 20 and max(len(piece) for piece, _ in pieces) < 80


# ------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"abcdefghij\xff", "a.txt is not UTF-8 text: .* at byte 10"),
        ("a.txt", b"abcdefgh\xe2\x82", "a.txt is not UTF-8 text: unexpected end of data at byte 8"),
        ("a.jsonl", b'{"text": "a"}\n{"text"', "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b'{"text": 1}', "line 1 has no string in a field 'text'"),
        ("a.jsonl", b'["text"]', "line 1 has no string in a field 'text'"),
        ("a.parquet", b"PAR1", "a.parquet is no Parquet file"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, name, content, message, small_pieces):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as raised:
        list(find_source(tmp_path).texts())
    assert str(tmp_path) in str(raised.value)


def test_a_parquet_file_without_text_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for column, message in (("content", "no column 'text', there are content"), ("text", "holds 1 in column")):
        pyarrow.parquet.write_table(pyarrow.table({column: [1]}), tmp_path / "a.parquet")
        with pytest.raises(ValueError, match=message):
            list(find_source(tmp_path).texts())


def test_a_parquet_file_that_is_damaged_inside_is_named(tmp_path):
    import pyarrow
    import pyarrow.parquet

    file = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ["some words " * 1000] * 100}), file, use_dictionary=False)
    content = bytearray(file.read_bytes())
    content[40:200] = bytes(160)
    file.write_bytes(content)
    with pytest.raises(ValueError, match="a.parquet is damaged"):
        list(find_source(file).texts())


def test_several_sources_are_one(tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(name)
    source = find_source(tmp_path / "b.txt", tmp_path)
    assert list(source.texts()) == ["b.txt", "a.txt", "b.txt"] and source.describe()["files"] == 3
    with pytest.raises(ValueError, match="source 'openwebtext' is the hub's and stands alone"):
        find_source(tmp_path, "openwebtext")


def test_a_path_that_is_missing_or_empty_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file or folder: .*missing"):
        find_source(tmp_path / "missing")
    with pytest.raises(ValueError, match="holds no files"):
        find_source(tmp_path)


def test_a_hub_that_cannot_be_reached_or_breaks_off_says_what_to_do(monkeypatch):
    import datasets

    def refuse(*args, **how):
        raise RuntimeError("no route\nto host")

    class Broken(datasets.IterableDataset):
        def __init__(self):
            pass

        info = datasets.DatasetInfo()
        state_dict = dict

        def __iter__(self):
            yield {"text": "a"}
            raise RuntimeError("reset by peer")

    source = HubDataset("x", "owner/x", None, 1)
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(OSError, match=r"owner/x could not be opened \(RuntimeError: no route\); .*Parquet"):
        list(source.texts())
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **how: Broken())
    with pytest.raises(OSError, match=r"owner/x broke off \(RuntimeError: reset by peer\); .*goes on"):
        list(source.texts())
