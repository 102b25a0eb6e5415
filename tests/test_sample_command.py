"""`fastgpt2 sample`, typed as a user types it."""

import io
import json

import pytest
from tiny_models import tiny

from fastgpt2.gpt2.cli import cli
from fastgpt2.gpt2.cli import sample as sample_command
from fastgpt2.gpt2.data.tokenizer import BPETokenizer, ByteTokenizer, CharTokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    tiny(vocab_size=256).save_pretrained(folder)
    ByteTokenizer().save(folder)
    return str(folder)


@pytest.fixture
def sample(folder, capsys):
    """Runs the command; -> (status, standard output, standard error)."""

    def run(*args):
        status = cli.main(["sample", "--checkpoint", folder, "--max-new-tokens", "9", "--device", "cpu", *args])
        return status, *capsys.readouterr()

    return run


def typed(monkeypatch, text, terminal=False):
    stdin = io.StringIO(text)
    stdin.isatty = lambda: terminal
    monkeypatch.setattr("sys.stdin", stdin)


def test_the_prompt_comes_from_an_argument_a_file_or_standard_input(sample, monkeypatch, tmp_path):
    _, expected, _ = sample("--prompt", "a b")
    (tmp_path / "prompt.txt").write_text("a b\n")
    assert sample("--file", str(tmp_path / "prompt.txt")) == (0, expected, "")
    typed(monkeypatch, "a b\n")
    assert sample() == (0, expected, "")
    typed(monkeypatch, "a b")
    assert sample("--file", "-") == (0, expected, "")
    assert expected.startswith("a b") and len(expected) > len("a b") + 1


def test_a_stream_ends_as_the_text_that_is_written_at_once(sample):
    for more in ((), ("--greedy",), ("--stop", "\ufffd"), ("--min-p", "0.1", "--repetition-penalty", "1.5")):
        assert sample("--prompt", "ab", "--stream", *more) == sample("--prompt", "ab", *more)


def test_a_stream_is_seen_while_it_is_written(sample, monkeypatch):
    seen = []
    monkeypatch.setattr("builtins.print", lambda *text, **more: seen.append((text, more.get("flush"))))
    sample("--prompt", "ab", "--stream")
    assert len(seen) > 5 and all(flush for _, flush in seen)


def test_json_is_a_line_a_text(sample):
    status, out, _ = sample("--prompt", "ab", "--json", "--num", "2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and len(lines) == 2 and lines[0] != lines[1]
    for line in lines:
        assert line["prompt"] == "ab" and line["completion"] and line["ended"] == "length"
        assert line["tokens"] == 9 == len(line["logprobs"])
    texts = sample("--prompt", "ab", "--num", "2")[1].split(f"\n{sample_command.RULE}\n")
    assert [line["prompt"] + line["completion"] for line in lines] == [texts[0], texts[1].removesuffix("\n")]


def test_the_model_does_not_train(sample, monkeypatch):
    """Else its laid-out weights would be made again for every text of a conversation."""
    seen = []
    monkeypatch.setattr(sample_command, "stream_text", lambda model, *args, **settings: seen.append(model) or [])
    sample("--prompt", "ab", "--stream")
    assert [model.training for model in seen] == [False]


def test_weights_can_be_bf16(sample):
    status, out, _ = sample("--prompt", "ab", "--dtype", "bfloat16", "--greedy")
    assert status == 0 and out.startswith("ab")


def test_a_long_prompt_is_told_or_refused(sample):
    status, _, err = sample("--prompt", "x" * 20)
    assert (
        status == 0 and err == "fastgpt2: warning: a prompt has 20 tokens, block_size is 8: the model sees the last 8\n"
    )
    assert sample("--prompt", "x" * 20, "--stream")[2] == err
    status, _, err = sample("--prompt", "x" * 20, "--refuse-long")
    assert (status, err) == (
        2, "fastgpt2: error: the prompt has 20 tokens, block_size is 8, and --refuse-long is given\n"
    )  # fmt: skip
    assert sample("--prompt", "x" * 8, "--refuse-long")[0] == 0


@pytest.mark.parametrize("form", [(), ("--stream",), ("--json",)])
def test_characters_without_a_token_are_named(tmp_path, capsys, form):
    tiny(vocab_size=4).save_pretrained(tmp_path)
    CharTokenizer("abc").save(tmp_path)
    args = ["sample", "--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "3", *form]
    assert cli.main([*args, "--prompt", "a€bx€d123"]) == 2
    out, err = capsys.readouterr()
    assert not out and "prompt holds '€', 'x', 'd', '1', '2' and 1 more, which the tokenizer has no token for" in err
    assert "its vocabulary has 4 tokens" in err
    assert cli.main([*args, "--prompt", "ab\ufffd"]) == 0  # the unknown one itself, as texts are written


def test_a_typed_line_without_tokens_is_told(tmp_path, capsys, monkeypatch):
    tiny(vocab_size=4).save_pretrained(tmp_path)
    CharTokenizer("abc").save(tmp_path)
    typed(monkeypatch, "x\na\n", terminal=True)
    args = ["sample", "--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "3"]
    assert cli.main(args) == 0
    out, err = capsys.readouterr()
    assert "prompt holds 'x'" in err and "> a" in out


def test_what_is_no_text_is_named(sample, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    status, _, err = sample("--file", str(tmp_path / "latin.txt"))
    assert status == 2 and "latin.txt is not UTF-8 text: unexpected end of data at byte 3" in err
    status, _, err = sample("--prompt", "caf\udce9")
    assert status == 2 and "--prompt is not UTF-8 text" in err
    status, _, err = sample("--prompt", "a", "--seed", "99999999999999999999")
    assert status == 2 and "seed is 99999999999999999999, allowed are 0..2147483647" in err


# ----------------------------------------------------------------------------------------------------- interactive


def test_a_line_that_cannot_be_used_is_told_and_the_next_one_asked_for(sample, monkeypatch):
    typed(monkeypatch, f"{'x' * 20}\na\n", terminal=True)
    status, out, err = sample("--refuse-long")
    assert status == 0 and "the prompt has 20 tokens, block_size is 8, and --refuse-long" in err and "> a" in out


def test_a_terminal_is_asked_again_and_again(sample, monkeypatch):
    expected = [sample("--prompt", p, "--seed", s)[1] for p, s in (("one", "7"), ("two", "8"))]
    for args, terminal in (((), True), (("--interactive",), False)):
        typed(monkeypatch, "one\n\ntwo\n", terminal)
        status, out, _ = sample("--seed", "7", *args)
        assert status == 0 and out.replace("> ", "") == "".join(expected) + "\n"


def test_ctrl_c_ends_a_text_and_then_the_command(sample, monkeypatch):
    def interrupted(*args, **settings):
        yield "piece"
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_command, "stream_text", interrupted)
    typed(monkeypatch, "one\ntwo\n", terminal=True)
    status, out, err = sample()
    assert status == 0 and out == "> onepiece\n> twopiece\n> \n" and "Traceback" not in err
    status, out, err = sample("--prompt", "a", "--stream")
    assert (status, out, err) == (130, "apiece\n", "fastgpt2: interrupted\n")

    def at_the_prompt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", at_the_prompt)
    assert sample("--interactive")[0] == 0


# -------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--file", "/no/such/file"], "/no/such/file"),
        ([], "standard input is empty"),
        (["--prompt", "a", "--stream", "--num", "2"], "--num is 2, --stream and --interactive write one text"),
        (["--interactive", "--json"], "--json is for a prompt"),
        (["--prompt", "a", "--stop", ""], "stop is empty"),
        (["--prompt", "a", "--min-p", "2"], "min_p is 2.0"),
        (["--prompt", "a", "--repetition-penalty", "0"], "repetition_penalty is 0.0"),
    ],
)
def test_mistakes_are_one_line(sample, monkeypatch, args, message):
    typed(monkeypatch, "")
    status, out, err = sample(*args)
    assert status == 2 and not out and message in err and len(err.splitlines()) == 1


def test_a_text_begins_from_the_end_of_another(tmp_path, capsys):
    tokenizer = BPETokenizer({bytes([b]): b for b in range(256)})
    tiny(vocab_size=257).save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    command = ["sample", "--checkpoint", str(tmp_path), "--device", "cpu", "--max-new-tokens", "5", "--greedy"]
    texts = []
    for more in (["--special-tokens"], ["--special-tokens", "--stream"], []):
        assert cli.main([*command, "--prompt", "<|endoftext|>", *more]) == 0
        texts.append(capsys.readouterr())
    assert texts[0] == texts[1] != texts[2] and not texts[0].err
    assert "block_size" in texts[2].err  # 13 characters, where a special token is one
