"""Guided sequences draw only what their grammar can go on with, also after a failover."""

import json

import pytest
from llguidance import LLMatcher
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from gpuworkers import grammar as grammar_module
from tests.gpuworkers.tinyllama import bench_of, write_tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 6},
        "degrees": {"type": "integer", "minimum": -9, "maximum": 9},
    },
    "required": ["city", "degrees"],
    "additionalProperties": False,
}
COMPACT = {"item_separator": ",", "key_separator": ":", "whitespace_flexible": False}
GRAMMAR = LLMatcher.grammar_from_json_schema(SCHEMA, overrides=COMPACT)
IDS = [5, 6, 7, 8, 9]
EOS = 2


def byte_tokenizer() -> str:
    """512 ids as the tiny model has: three special ones, then the bytes, then nothing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<bos>", "<eos>", *letters]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<unk>", "<bos>", "<eos>"])
    return tokenizer.to_str()


@pytest.fixture
def folder(tmp_path):
    made = write_tiny(tmp_path)
    (made / "tokenizer.json").write_text(byte_tokenizer())
    return made


@pytest.fixture
def text_of(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda ids: tokenizer.decode(ids, skip_special_tokens=True)


def run(folder, name="r", count=64, **sampling):
    bench = bench_of(folder)
    bench.assign(name, IDS, count, **sampling)
    bench.run_dry()
    return bench


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 1.0, "seed": 3}, {"top_k": 5, "temperature": 2.0}]
)
def test_a_random_model_writes_what_the_schema_wants(folder, text_of, sampling):
    bench = run(folder, grammar=GRAMMAR, **sampling)
    ids = bench.output("r")
    assert ids[-1] == EOS
    value = json.loads(text_of(ids))
    assert set(value) == {"city", "degrees"} and -9 <= value["degrees"] <= 9
    assert len(value["city"]) <= 6


def test_rows_without_a_grammar_are_not_touched(folder):
    alone = run(folder, name="free", count=20)
    bench = bench_of(folder)
    bench.assign("guided", IDS, 40, grammar=GRAMMAR)
    bench.assign("free", IDS, 20)
    bench.run_dry()
    assert bench.output("free") == alone.output("free")


def test_a_resumed_sequence_goes_on_inside_the_grammar(folder):
    sampling = {"grammar": GRAMMAR, "temperature": 1.0, "seed": 11}
    whole = run(folder, **sampling).output("r")
    for kept in range(len(whole)):
        bench = bench_of(folder)
        bench.assign("r", IDS, 64, epoch=2, delivered=whole[:kept], **sampling)
        bench.run_dry()
        assert whole[:kept] + bench.output("r")[-(len(whole) - kept) :] == whole


def test_masks_are_made_again_for_matchers_that_were_dropped(folder, monkeypatch):
    sampling = {"grammar": GRAMMAR, "temperature": 1.0}
    names = ("a", "b", "c")
    expected = [run(folder, name, seed=i, **sampling).output(name) for i, name in enumerate(names)]
    monkeypatch.setattr(grammar_module, "MATCHERS_MAX", 1)
    bench = bench_of(folder)
    for index, name in enumerate(names):
        bench.assign(name, IDS, 64, seed=index, **sampling)
    bench.run_dry()
    assert [bench.output(name) for name in names] == expected
    assert len(bench.runner._grammars._matchers) == 1


def test_ids_that_break_the_grammar_end_the_sequence_as_an_error(folder):
    bench = bench_of(folder)
    bench.assign("r", IDS, 64, delivered=[300, 301], grammar=GRAMMAR)
    bench.run_dry()
    assert bench.reports[-1].finish_reason == "error"


def test_an_engine_without_a_vocabulary_refuses(tmp_path):
    bench = bench_of(write_tiny(tmp_path))
    refused = bench.assign("r", IDS, 8, grammar=GRAMMAR)
    assert refused.reason == "no_grammar"
