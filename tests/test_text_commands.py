"""Commands that write texts: rewriting, continuing, scoring, and making new examples, as a person types them."""

import json
import logging
import shutil

import numpy as np
import pytest

import electrax
from electrax import cli
from electrax.config import UserError, build
from electrax.experiment import augment
from electrax.experiment.examples import ExamplesConfig, read_examples
from electrax.inference.batching import batch_tokens, use_batch_tokens
from tests.fixtures.compilations import compilations
from tests.fixtures.finetuning import (
    REVIEWS,
    call,
    make_pretrained,
    params_of,
    results_of,
    write,
    write_glue,
    write_rows,
)

PAIRS = [
    (f"the {a} {b}", f"{b} {a} it") for a in ("red", "good", "old", "fine") for b in ("cat", "dog", "house", "man")
]
SMALL = ["--model.layers=1", "--model.width=16", "--model.heads=2", "--model.max_length=32", "--decoder.max_length=8"]
SMALL += ["--data.tokenizer=bpe", "--data.vocab_size=320", "--data.max_length=16", "--data.shapes=1", "--batch_size=8"]


def write_parallel(folder, splits=("train", "dev")):
    for split in splits:
        for place, ending in enumerate(("src", "tgt")):
            write(folder / f"{split}.{ending}", "".join(f"{pair[place]}\n" for pair in PAIRS))
    return folder


def config_of(folder, **decoder):
    options = "".join(f"{key} = {json.dumps(value)}\n" for key, value in decoder.items())
    text = f"""task = "rewrite"\nmetric = "chrf"\n[data]\nformat = "parallel"\ntext = ["src"]\nlabel = "tgt"
[decoder]\nbeams = 2\n{options}"""
    return write(folder / "config.toml", text)


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """Trained until it knows its sixteen pairs, with a vocabulary for each side."""
    folder = tmp_path_factory.mktemp("translator")
    words = ["--data.path", write_parallel(folder / "data"), "--workdir", folder / "run", *SMALL]
    # read every step: eight devices with many steps ahead of them may wait for each other on two busy cores
    words += [
        "--steps=200",
        "--log.every=1",
        "--eval.every=200",
        "--optimizer.learning_rate=0.005",
        "--model.body=modern",
    ]
    words += ["--model.dropout=0", "--model.attention_dropout=0"]
    config = config_of(folder, tokenizer="bpe", vocab_size=300, coverage_penalty=0.1)
    status, output = call("finetune", config, *words)
    assert status == 0
    return folder / "run", output


def test_a_small_decoder_learns_to_rewrite_its_training_pairs(translator):
    workdir, output = translator
    results = results_of(workdir)
    assert (results["task"], results["metric"]) == ("rewrite", "chrf")
    assert results["score"] > 90
    assert "tok:13a" in output and "texts of " in output
    assert {row["metric"] for row in results["signature"]} == {"bleu", "chrf"}
    model = electrax.load(workdir)
    assert model.task.coverage_penalty == 0.1
    assert model.rewrite([pair[0] for pair in PAIRS]) == [pair[1] for pair in PAIRS]


def test_predict_writes_the_outputs_in_order_and_as_many_as_are_wanted(translator, tmp_path):
    source = write(tmp_path / "in.txt", "the old man\n\nthe red cat\n")
    status, output = call("predict", translator[0], source, "--n_best", 2)
    first, empty, last = map(json.loads, output.splitlines())
    assert status == 0
    assert (first["output"], last["output"]) == ("man old it", "cat red it")
    assert "line 2" in empty["error"]
    assert [each["text"] for each in first["candidates"]][0] == "man old it"
    assert first["candidates"][0]["score"] > first["candidates"][1]["score"]


def test_a_model_that_was_moved_has_both_of_its_vocabularies(translator, tmp_path):
    shutil.copytree(translator[0], tmp_path / "moved")
    hidden = translator[0].rename(translator[0].with_name("hidden"))
    try:
        assert electrax.load(tmp_path / "moved").rewrite(["the old man"]) == ["man old it"]
        data = translator[0].parent / "data"
        assert call("evaluate", tmp_path / "moved", "--data.path", data, "--data.dev", "dev")[0] == 0
    finally:
        hidden.rename(translator[0])


def test_a_run_goes_on_from_a_translator_whose_outputs_are_the_same_and_from_its_encoder_otherwise(
    translator, tmp_path
):
    workdir, before = translator[0], params_of(translator[0])
    words = ["--data.path", workdir.parent / "data", "--init_from", workdir, *SMALL[4:], "--steps=1", "--eval.every=1"]
    words += ["--optimizer.learning_rate=1e-9", "--model.dropout=0"]
    same = config_of(tmp_path, tokenizer=str(workdir / "target"))
    assert "the head too is taken from" in call("finetune", same, *words, "--workdir", tmp_path / "same")[1]
    np.testing.assert_allclose(
        params_of(tmp_path / "same")["decoder/layer_0/up/kernel"], before["decoder/layer_0/up/kernel"], atol=1e-6
    )
    other = config_of(tmp_path, tokenizer="bpe", vocab_size=280)
    assert "the head of" in call("finetune", other, *words, "--workdir", tmp_path / "other")[1]
    after = params_of(tmp_path / "other")
    expected = before["discriminator/encoder/layer_0/up/kernel"]
    np.testing.assert_allclose(after["decoder/layer_0/up/kernel"], expected, atol=1e-6)


def test_predict_takes_a_pretrained_model_as_the_reranker(translator, tmp_path):
    judge = make_pretrained(tmp_path / "judge")
    source = write(tmp_path / "in.txt", "the old man\n")
    words = ["predict", translator[0], source, "--n_best=2", "--reranker", judge]
    found = json.loads(call(*words)[1])["candidates"]
    texts = [each["text"] for each in found if each["text"].strip()]
    scores = electrax.load(judge).originality(texts)
    np.testing.assert_allclose([each["score"] for each in found][: len(texts)], scores, rtol=1e-4)
    assert scores.tolist() == sorted(scores, reverse=True)
    with pytest.raises(UserError, match="expected a pretrained model"):
        call(*words[:-1], translator[0])


def test_a_reranker_puts_the_most_original_output_first(translator):
    class Judge:
        def originality(self, texts, truncate=False):
            return np.array([-float(len(text)) for text in texts])

    found = electrax.load(translator[0]).candidates(["the old man"], n_best=2, reranker=Judge())[0]
    assert found[0].score >= found[1].score
    assert [each.score for each in found] == [-float(len(each.text)) for each in found]


def test_after_warming_up_a_translator_compiles_nothing(translator):
    model = electrax.load(translator[0])
    assert model.warm_up(longest=16) > 0
    with compilations() as found:
        assert model.rewrite(["the old man", "the red cat"] * 9) == ["man old it", "cat red it"] * 9
    assert not found


def test_long_sources_are_cut_with_a_count(translator, caplog):
    with caplog.at_level(logging.WARNING, logger="electrax"):
        electrax.load(translator[0]).rewrite(["the old man " * 20, "the red cat"])
    assert "1 of 2 texts longer than 16 tokens were cut" in caplog.text


def test_a_translator_is_exported_with_both_vocabularies_and_to_no_other_library(translator, tmp_path):
    assert call("export", translator[0], tmp_path / "out", "--format", "safetensors")[0] == 0
    assert electrax.load(tmp_path / "out").rewrite(["the old man"]) == ["man old it"]
    for words in (
        ["export", translator[0], tmp_path / "o", "--format", "onnx"],
        ["convert", translator[0], tmp_path / "c"],
    ):
        with pytest.raises(UserError, match="decoding has no form in onnx|no counterpart in Transformers"):
            call(*words)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--decoder.beams=400"], "decoder.beams 400 is more than the [0-9]+ tokens of the vocabulary"),
        (["--decoder.coverage_penalty=-1"], "decoder.coverage_penalty must not be negative, not -1"),
        (["--decoder.max_length=64"], "decoder.max_length 64 is more than the model's 32"),
        (["--decoder.weights=shared", "--decoder.layers=3"], 'decoder.weights "shared" needs as many layers'),
        (["--data.label=missing"], "dev.missing: no such file"),
        (["--data.format=glue", "--data.glue=sst2"], "reads a table or parallel files"),
    ],
)
def test_what_does_not_fit_a_decoder_is_one_clear_line(tmp_path, options, message):
    words = ["--data.path", write_parallel(tmp_path / "data"), "--workdir", tmp_path / "run", *SMALL, "--steps=1"]
    with pytest.raises(UserError, match=message):
        call("finetune", config_of(tmp_path), *words, *options)


def test_a_decoder_starts_as_the_pretrained_encoders_layers(tmp_path):
    start = make_pretrained(tmp_path / "pretrained", model={"layers": 2})
    words = ["--data.path", write_parallel(tmp_path / "data"), "--workdir", tmp_path / "run", "--init_from", start]
    words += ["--steps=1", "--eval.every=1", "--metric=loss", "--optimizer.learning_rate=1e-9", "--decoder.layers=1"]
    words += ["--data.max_length=16", "--decoder.max_length=8", "--data.shapes=1", "--batch_size=8"]
    assert call("finetune", config_of(tmp_path), *words)[0] == 0
    before, after = params_of(start), params_of(tmp_path / "run")
    for name in ("attention/qkv/kernel", "up/kernel", "output_norm/scale"):
        expected = before[f"discriminator/encoder/layer_0/{name}"]
        np.testing.assert_allclose(after[f"decoder/layer_0/{name}"], expected, atol=1e-6)
    table = before["embeddings/word"]
    np.testing.assert_allclose(after["embeddings/word"][: len(table)], table, atol=1e-6)


# -- continuing and scoring -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return make_pretrained(tmp_path_factory.mktemp("causal") / "run", generator={"kind": "causal"})


def test_generate_writes_a_json_line_for_each_sample(causal, tmp_path):
    words = ["generate", causal, "--prompt", '["the film", "who"]', "--samples=2", "--max_tokens=4", "--seed=3"]
    status, output = call(*words)
    lines = list(map(json.loads, output.splitlines()))
    assert status == 0
    assert [line["prompt"] for line in lines] == ["the film", "the film", "who", "who"]
    assert call(*words)[1] == output
    source = write(tmp_path / "prompts.txt", "the film\n\n" + "the cat " * 40 + "\n")
    first, empty, long = map(json.loads, call("generate", causal, "--input", source, "--temperature=0")[1].splitlines())
    assert set(first) == {"prompt", "text", "reason", "log_probability"}
    assert "line 2" in empty["error"] and "line 3" in long["error"] and "expected at most 14" in long["error"]


def test_equal_prompts_are_continued_by_their_number_however_they_are_given(causal, tmp_path):
    words = ["--max_tokens=6", "--seed=3"]
    given = call("generate", causal, "--prompt", '["the film", "who", "the film"]', *words)[1]
    source = write(tmp_path / "prompts.txt", "the film\nwho\nthe film\n")
    assert call("generate", causal, "--input", source, *words)[1] == given
    texts = [json.loads(line)["text"] for line in given.splitlines()]
    assert texts[0] != texts[2]


def test_a_prompt_that_is_too_long_does_not_keep_the_others_back(causal):
    prompts = json.dumps(["the cat " * 40, "the film"])
    long, first = map(json.loads, call("generate", causal, "--prompt", prompts, "--max_tokens=2")[1].splitlines())
    assert "prompt 0: expected at most 14 tokens, found 80" in long["error"] and first["prompt"] == "the film"


def test_score_gives_perplexities_and_originalities_of_lines_or_of_a_whole_file(causal, tmp_path):
    source = write(tmp_path / "texts.txt", "the film was good\nwho sat on the mat\n")
    lines = [json.loads(line) for line in call("score", causal, source)[1].splitlines()]
    model = electrax.load(causal)
    assert lines[0]["perplexity"] == pytest.approx(model.perplexity("the film was good"), rel=1e-5)
    assert lines[0]["bits_per_byte"] == pytest.approx(-lines[0]["log_probability"] / np.log(2) / 17)
    whole = json.loads(call("score", causal, source, "--whole", "true")[1])
    assert whole["perplexity"] == pytest.approx(model.perplexity("the film was good\nwho sat on the mat"), rel=1e-5)
    original = [
        json.loads(line)["originality"] for line in call("score", causal, source, "--by=originality")[1].splitlines()
    ]
    expected = [np.mean([np.log1p(-token.probability) for token in model.detect(text)]) for text in
                ("the film was good", "who sat on the mat")]  # fmt: skip
    np.testing.assert_allclose(original, expected, rtol=1e-4)
    some = call("score", causal, source, "--by=originality", "--batch_tokens=16")[1].splitlines()
    assert batch_tokens() == 16
    np.testing.assert_allclose([json.loads(line)["originality"] for line in some], original, rtol=1e-5)
    use_batch_tokens(0)
    long = write(tmp_path / "long.txt", "the cat " * 40 + "\n")
    assert "expected at most 14 tokens" in json.loads(call("score", causal, long, "--by=originality")[1])["error"]


def test_a_model_without_a_decoder_is_asked_in_vain(tmp_path, causal, translator):
    masked = make_pretrained(tmp_path / "masked")
    for words, message in [
        (["generate", masked, "--prompt", "the"], "generate: this model has no decoder"),
        (["score", causal, "-", "--by=pseudo_log_likelihood", "--whole=true"], "stride and whole are for perplexity"),
        (["generate", causal], "either --prompt TEXT or --input FILE"),
        (["generate", translator[0], "--prompt", "the"], "expected a pretrained model; predict is for fine-tuned ones"),
        (["generate", causal, "--prompt=the", "--top_k=1000"], "top_k 1000 is more than the .* tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            call(*words)


# -- new examples -----------------------------------------------------------------------------------------------------


def test_new_examples_keep_the_format_of_the_old_ones_and_say_what_they_were_made_of(tmp_path):
    generator = make_pretrained(tmp_path / "generator")
    rows = write_rows(tmp_path / "reviews.csv", REVIEWS)
    words = ["augment", rows, "--out", tmp_path / "new.jsonl", "--generator", generator, "--data.holdout=0.2"]
    status, output = call(*words, "--per_row=2", "--share=0.3", "--keep=0.5")
    made = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert status == 0 and f"{len(made)} original" in output
    labels = dict(REVIEWS)
    lines = rows.read_text().splitlines()
    for row in made:
        assert set(row) == {"text", "label", "origin", "source", "originality"}
        old = lines[int(row["source"].rpartition(" ")[2]) - 1].partition(",")[0]
        assert row["label"] == labels[old] and row["text"] != old and row["origin"] == "replace"
    call(*words, "--per_row=2", "--share=0.3", "--keep=0.5")
    assert made == [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]


def test_no_new_example_is_made_of_a_row_that_fine_tuning_holds_out(tmp_path):
    rows = write_rows(tmp_path / "grades.csv", [(text, str(n % 5)) for n, (text, _) in enumerate(REVIEWS)])
    asked = {"kind": "number", "data": {"holdout": 0.25}}
    values = asked | {"dataset": str(rows), "out": str(tmp_path / "new.jsonl"), "generator": "unread"}
    taken = {row.texts for row in augment._examples(build(augment.AugmentConfig, values, "the test"))}
    trained, held_out, _ = read_examples(ExamplesConfig(path=str(rows), holdout=0.25), "number")
    assert taken == {row.texts for row in trained} and taken.isdisjoint(row.texts for row in held_out)


def test_fine_tuning_mixes_new_examples_in_at_the_rate_that_is_stated(tmp_path):
    rows = write_rows(tmp_path / "reviews.csv", REVIEWS)
    new = [{"text": f"the film {n} was good", "label": "yes"} for n in range(30)]
    write(tmp_path / "new.jsonl", "".join(json.dumps(row) + "\n" for row in new))
    words = ["--data.path", rows, "--workdir", tmp_path / "run", *SMALL[:4], "--data.max_length=16", "--data.shapes=1"]
    words += ["--steps=1", "--batch_size=8", "--data.holdout=0.25", "--data.augment", tmp_path / "new.jsonl"]
    assert "27 training and 6 dev rows" in call("finetune", "csv", *words, "--data.augment_rate=0.5")[1]
    with pytest.raises(UserError, match="new.jsonl, line 1: expected one of the labels"):
        write(tmp_path / "new.jsonl", json.dumps({"text": "a", "label": "maybe"}) + "\n")
        call("finetune", "csv", *words, "--dry_run=true")


def test_a_teacher_labels_the_new_rows_of_a_benchmark_where_it_is_sure(tmp_path):
    generator = make_pretrained(tmp_path / "generator")
    write_glue(tmp_path / "glue", "sst2")
    small = ["--init_from", generator, "--data.max_length=16", "--data.shapes=1", "--batch_size=8", "--steps=1"]
    assert call("finetune", "sst2", "--data.path", tmp_path / "glue", "--workdir", tmp_path / "teacher", *small)[0] == 0
    words = ["augment", tmp_path / "glue", "--out", tmp_path / "new.jsonl", "--generator", generator]
    words += ["--data.format=glue", "--data.glue=sst2", "--share=0.5", "--teacher", tmp_path / "teacher"]
    assert call(*words)[0] == 0
    made = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    taught = electrax.load(tmp_path / "teacher").predict([row["sentence"] for row in made])
    assert [row["label"] for row in made] == [row["label"] for row in taught]
    np.testing.assert_allclose([row["confidence"] for row in made], [row["probability"] for row in taught], rtol=1e-4)
    limit = float(np.median([row["confidence"] for row in made]))
    call(*words, f"--min_confidence={limit}")
    sure = [json.loads(line) for line in (tmp_path / "new.jsonl").read_text().splitlines()]
    assert sure == [row for row in made if row["confidence"] >= limit]
    mixed = ["--data.augment", tmp_path / "new.jsonl", "--workdir", tmp_path / "mixed", *small]
    assert f"{8 + len(sure)} training" in call("finetune", "sst2", "--data.path", tmp_path / "glue", *mixed)[1]


def test_texts_without_labels_are_continued_into_texts_to_pretrain_on(causal, tmp_path):
    source = write(tmp_path / "texts.txt", "the film was good and fine\n\nwho sat on the mat\n")
    assert call("augment", source, "--out", tmp_path / "new.txt", "--generator", causal, "--how=continue")[0] == 0
    made = (tmp_path / "new.txt").read_text().strip().split("\n\n")
    origins = [json.loads(line) for line in (tmp_path / "new.txt.origin.jsonl").read_text().splitlines()]
    assert len(made) == len(origins) == 2
    assert made[0].startswith("the film was") and origins[0]["origin"] == "continue"
    assert [row["source"].rpartition(", ")[2] for row in origins] == ["line 1", "line 3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "a.txt"], "expected a name ending in .jsonl"),
        (["--out", "a.jsonl", "--min_confidence=0.9"], "is a teacher's"),
        (["--out", "a.jsonl", "--share=1.5"], "share between 0 and 1"),
        (["--out", "a.jsonl", "--data.max_length=64"], "data.max_length has no effect here; known are format, glue"),
    ],
)
def test_wishes_that_cannot_be_met_are_one_clear_line(tmp_path, words, message):
    with pytest.raises(UserError, match=message):
        cli.run(["augment", "rows.csv", "--generator", "none", *words])
