import dataclasses
from typing import Literal

import pytest

from electrax import config as module
from electrax.config import UserError, build, find_config, load, parse_overrides, read_toml, to_toml


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    layers: int = 2
    body: Literal["old", "new"] = "old"


@dataclasses.dataclass(frozen=True)
class Outer:
    """Its check refuses what no complete config may be."""

    name: str = ""
    steps: int = 0
    verbose: bool = False
    files: tuple[str, ...] = ()
    limit: int | None = None
    warmup_steps: float = 1.0
    inner: Inner = Inner()

    def __post_init__(self):
        if not self.name:
            raise UserError("name is empty")


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


# -- where a value comes from -----------------------------------------------------------------------------------------


def test_a_default_gives_way_to_the_base_the_base_to_the_file_and_the_file_to_the_command_line(tmp_path):
    write(tmp_path / "base.toml", 'name = "base"\nsteps = 1\n[inner]\nrate = 0.1\nlayers = 3\nbody = "new"\n')
    top = write(tmp_path / "top.toml", 'base = "base.toml"\nsteps = 2\n[inner]\nlayers = 4\n')
    config = load(Outer, top, ["--inner.layers", "5"])
    assert config == Outer(name="base", steps=2, inner=Inner(rate=0.1, layers=5, body="new"))
    assert config.verbose is False  # named nowhere


def test_a_base_is_relative_to_the_file_that_names_it_and_may_have_a_base_itself(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path / "a.toml", 'name = "a"\nsteps = 1\nwarmup_steps = 7\n')
    write(tmp_path / "sub" / "b.toml", 'base = "../a.toml"\nsteps = 2\n')
    c = write(tmp_path / "c.toml", 'base = "sub/b.toml"\nname = "c"\n')
    assert load(Outer, c) == Outer(name="c", steps=2, warmup_steps=7.0)


def test_a_command_line_need_not_be_a_complete_config(tmp_path):
    path = write(tmp_path / "c.toml", 'name = "run"\n')
    assert load(Outer, path, ["--steps", "3"]).steps == 3


def test_a_file_need_not_be_a_complete_config(tmp_path):
    path = write(tmp_path / "c.toml", "steps = 3\n")
    assert load(Outer, path, ["--name", "run"]).name == "run"


def test_a_config_that_is_incomplete_altogether_is_refused(tmp_path):
    with pytest.raises(UserError, match="name is empty"):
        load(Outer, write(tmp_path / "c.toml", "steps = 3\n"))


@pytest.mark.parametrize("text", ['base = "c.toml"\n', 'base = "./c.toml"\n', 'base = "other.toml"\n'])
def test_a_base_that_leads_back_to_the_file_is_an_error(tmp_path, text):
    write(tmp_path / "other.toml", 'base = "c.toml"\n')
    with pytest.raises(UserError, match="base .* leads back to the file itself"):
        read_toml(write(tmp_path / "c.toml", text))


def test_a_base_that_is_no_name_or_no_file_is_an_error(tmp_path):
    with pytest.raises(UserError, match="c.toml: base is 5, but must be the name of a TOML file"):
        read_toml(write(tmp_path / "c.toml", "base = 5\n"))
    with pytest.raises(UserError, match="gone.toml: cannot be read"):
        read_toml(write(tmp_path / "c.toml", 'base = "gone.toml"\n'))


def test_a_file_that_is_not_toml_is_named_with_the_line(tmp_path):
    with pytest.raises(UserError, match=r"c.toml: not TOML: .*line 2"):
        read_toml(write(tmp_path / "c.toml", "steps = 1\nname =\n"))


# -- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--inner.layers", "7", "--warmup_steps", "3", "--verbose"],
        ["--inner.layers=7", "--warmup_steps=3", "--verbose=true"],
        ["--warmup-steps", "3", "--verbose", "true", "--inner.layers", "7"],
        ["--inner.layers", "1", "--warmup-steps=3", "--verbose", "--inner.layers", "7"],  # the last one counts
    ],
)
def test_every_spelling_of_an_option_is_understood(words):
    config = build(Outer, {"name": "x"} | parse_overrides(words), "command line")
    assert config == Outer(name="x", warmup_steps=3.0, verbose=True, inner=Inner(layers=7))


@pytest.mark.parametrize("text", ["2024", "1e3", "1.50", "007", "true", "2026-01-02", "[a]", "runs/a=b", "-x", "a b"])
def test_a_text_option_is_taken_as_it_stands(text):
    config = build(Outer, parse_overrides(["--name", text]), "command line")
    assert (config.name, type(config.name)) == (text, str)


def test_one_item_is_a_list_of_one():
    assert build(Outer, {"name": "x"} | parse_overrides(["--files", "x.txt"]), "command line").files == ("x.txt",)


def test_values_may_be_spelt_as_help_shows_them():
    config = build(Outer, {"name": "x"} | parse_overrides(["--verbose", "True", "--limit", "None"]), "command line")
    assert config == Outer(name="x", verbose=True, limit=None)


def test_a_value_may_hold_an_equals_sign_or_be_negative_or_a_list():
    words = ["--name=a=b", "--steps", "-5", "--files", '["x.txt", "y.txt"]', "--limit=9"]
    config = build(Outer, parse_overrides(words), "command line")
    assert config == Outer(name="a=b", steps=-5, files=("x.txt", "y.txt"), limit=9)


@pytest.mark.parametrize("words", [["--name"], ["--name", "--steps", "5"]])
def test_a_text_option_without_a_value_is_an_error(words):
    with pytest.raises(UserError, match="command line: name is true, but must be text"):
        build(Outer, parse_overrides(words), "command line")


@pytest.mark.parametrize("words", [["steps", "5"], ["-s", "5"], ["--"], ["--steps", "5", "6"]])
def test_a_stray_word_is_named(words):
    with pytest.raises(UserError, match=r"^(steps|-s|--|6): expected --section.key value$"):
        parse_overrides(words)


# -- wrong keys and values --------------------------------------------------------------------------------------------


def test_an_unknown_key_is_named_with_its_file_and_the_nearest_right_one(tmp_path):
    path = write(tmp_path / "c.toml", 'name = "x"\n[inner]\nlayer = 3\n')
    with pytest.raises(UserError) as caught:
        load(Outer, path)
    assert str(caught.value) == f"{path}: unknown key inner.layer; did you mean inner.layers?"


def test_an_unknown_option_is_named_as_one_of_the_command_line(tmp_path):
    path = write(tmp_path / "c.toml", 'name = "x"\n')
    with pytest.raises(UserError) as caught:
        load(Outer, path, ["--warmup-step", "3"])
    assert str(caught.value) == "command line: unknown key warmup_step; did you mean warmup_steps?"


def test_a_key_that_is_like_none_is_answered_with_all_of_them():
    with pytest.raises(UserError) as caught:
        build(Outer, {"inner": {"zzz": 1}}, "f.toml")
    assert str(caught.value) == "f.toml: unknown key inner.zzz; known here: rate, layers, body"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, 'steps is "many", but must be a whole number'),
        ({"steps": 1.5}, "steps is 1.5, but must be a whole number"),
        ({"steps": True}, "steps is true, but must be a whole number"),
        ({"inner": {"rate": "fast"}}, 'inner.rate is "fast", but must be a number'),
        ({"inner": {"rate": True}}, "inner.rate is true, but must be a number"),
        ({"verbose": 1}, "verbose is 1, but must be true or false"),
        ({"name": 5}, "name is 5, but must be text"),
        ({"files": 5}, "files is 5, but must be a list"),
        ({"files": ["a.txt", 5]}, "files is 5, but must be text"),
        ({"limit": "low"}, 'limit is "low", but must be a whole number'),
        ({"inner": {"body": "newer"}}, 'inner.body is "newer", but must be one of old, new'),
        ({"inner": 5}, "inner is a section; set one of its keys, as in --inner.NAME value"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(values, message):
    with pytest.raises(UserError) as caught:
        build(Outer, values, "f.toml")
    assert str(caught.value) == f"f.toml: {message}"


def test_a_wrong_option_is_blamed_on_the_command_line_and_a_wrong_key_on_the_file(tmp_path):
    path = write(tmp_path / "c.toml", 'name = "x"\nsteps = "many"\n')
    with pytest.raises(UserError, match="^command line: inner.body is"):
        load(Outer, path, ["--inner.body", "newer"])
    with pytest.raises(UserError, match=r"c\.toml: steps is"):
        load(Outer, path, ["--steps", "3"])


def test_whole_numbers_and_numbers_become_each_other_where_nothing_is_lost():
    config = build(Outer, {"name": "x", "steps": 1e3, "warmup_steps": 2}, "f.toml")
    assert (config.steps, type(config.steps)) == (1000, int)
    assert (config.warmup_steps, type(config.warmup_steps)) == (2.0, float)


# -- files ------------------------------------------------------------------------------------------------------------


def test_a_config_written_as_toml_reads_back_equal(tmp_path):
    config = Outer(
        name='a "quoted" name\\with\ttabs — and ünïcode',
        steps=3,
        verbose=True,
        files=("x", "y z"),
        warmup_steps=1e-5,
        inner=Inner(rate=2e20, body="new"),
    )
    assert load(Outer, write(tmp_path / "c.toml", to_toml(config))) == config
    assert load(Outer, tmp_path / "c.toml", ["--limit", "3"]) == dataclasses.replace(config, limit=3)


def test_a_bare_name_is_a_shipped_config_and_a_path_is_a_file(tmp_path, monkeypatch):
    (tmp_path / "shipped" / "pretrain").mkdir(parents=True)
    shipped = write(tmp_path / "shipped" / "pretrain" / "mini.toml", "steps = 1\n")
    monkeypatch.setattr(module, "shipped_configs", lambda: tmp_path / "shipped")
    monkeypatch.chdir(tmp_path)
    assert find_config("mini", "pretrain") == shipped
    own = write(tmp_path / "mine.toml", "steps = 1\n")
    assert find_config(str(own), "pretrain") == own
    assert find_config("mine.toml", "pretrain").resolve() == own
    with pytest.raises(UserError, match="^other: no such file, and no shipped config of that name; shipped: mini$"):
        find_config("other", "pretrain")
    with pytest.raises(UserError, match="^mini: no such file"):
        find_config("mini", "finetune")


def test_the_checkout_ships_its_configs():
    assert find_config("tiny", "pretrain").read_text().startswith("#")


@pytest.mark.parametrize(
    "text, message",
    [
        ("a = " + "[" * 65 + "]" * 65, "not TOML: nested deeper than 64"),
        ("a = " + "[" * 5000, "not TOML: nested too deeply"),
        ("a." * 100 + "a = 1", "not TOML: nested deeper than 64"),
        ("steps = " + "1" * 5000, "not TOML: Exceeds the limit"),
        ("a." * 40_000 + "a = 1", "expected a config of at most 64 KiB"),
        ('base = "a\\u0000"', "must be the name of a TOML file"),
    ],
)
def test_a_file_that_would_take_long_or_break_its_reader_is_refused(tmp_path, text, message):
    (tmp_path / "f.toml").write_text(text)
    with pytest.raises(UserError, match=message):
        read_toml(tmp_path / "f.toml")


@pytest.mark.parametrize("value", [2**63, -(2**64), 10**30, float("inf"), float("nan")])
def test_numbers_are_finite_and_whole_ones_of_64_bits(value):
    for key in ("rate", "layers"):
        with pytest.raises(UserError, match=f"f.toml: inner.{key} is .*, but must be"):
            build(Outer, {"inner": {key: value}}, "f.toml")


@pytest.mark.parametrize("text", ["a\0", "a\x7f", "\ud800"])
def test_a_text_that_no_file_could_keep_is_refused(text):
    with pytest.raises(UserError, match="f.toml: name is .*, but must be text without NUL"):
        build(Outer, {"name": text}, "f.toml")


def test_an_error_is_one_line_of_a_bounded_length_that_does_not_control_the_terminal():
    assert str(UserError("a\nb\x1b[2J\u2028é")) == r"a\nb\x1b[2J\u2028é"
    assert len(str(UserError("x" * 10**6))) == 2001
