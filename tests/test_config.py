import inspect
from dataclasses import asdict, fields

import pytest

from splatedit.config import (
    GUIDANCES,
    KEYS,
    PRESETS,
    RIGS,
    SOLVERS,
    TEXT,
    UPS,
    WEIGHTS,
    Config,
    is_rig,
    load_config,
    rig,
    save_config,
    typed,
)
from splatedit.errors import InputError


def test_later_layers_win(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("steps: 10\nseed: 1\nguidance: dds\n")
    config = load_config(file, {"seed": 2, "guidance": None}, ["steps=30"])
    assert (config.steps, config.seed, config.guidance, config.model) == (30, 2, "dds", "pocket")


def test_words_are_read_as_yaml_except_text():
    words = ["t_range=[0, 0.5]", "lr_means=1e-3", "guidance_scale=null", "viewer=true", "source_prompt=no", "up=-y"]
    config = load_config(words=words)
    assert config.t_range == [0.0, 0.5] and config.lr_means == 1e-3 and config.guidance_scale is None
    assert config.viewer is True and config.source_prompt == "no" and config.up == "-y"
    assert load_config(words=["source_prompt=null"]).source_prompt is None
    assert load_config(words=["source_prompt="]).source_prompt == ""  # asked for, not left open


@pytest.mark.parametrize("prompt", ["a ${pig}", "a pig: pink", "yes", "1e3", "{a}", "x=y", "ein Schwein 🐖"])
def test_any_prompt_survives_the_file(prompt, tmp_path):
    save_config(load_config(options={"prompt": prompt}, words=[f"source_prompt={prompt}"]), tmp_path / "c.yaml")
    again = load_config(tmp_path / "c.yaml")
    assert again.prompt == again.source_prompt == prompt


def test_a_saved_file_repeats_every_setting(tmp_path):
    config = load_config(words=["steps=7", "background=[0, 0.25, 1]", "guidance_scale=3", "up=+z", "cameras=orbit:5"])
    save_config(config, tmp_path / "c.yaml")
    assert load_config(tmp_path / "c.yaml") == config


@pytest.mark.parametrize(
    ("word", "words_of_the_message"),
    [
        ("stepz=3", ["'stepz'", "'steps'"]),
        ("guidance-scale=3", ["'guidance_scale'"]),
        ("zzzz=1", ["splatedit run --help"]),
        ("pig", ["key=value", "quotes"]),
        ("=3", ["not a setting"]),
        ("steps=a", ["steps", "'a'", "whole number"]),
        ("steps=1.5", ["steps", "1.5", "whole number"]),
        ("steps=null", ["steps", "None"]),
        ("steps=true", ["steps", "True"]),
        ("steps=0", ["steps", "0", "1 or more"]),
        ("steps=${seed}", ["interpolation"]),
        ("steps=[", ["'['"]),
        ("seed=-1", ["seed", "-1"]),
        ("viewer=maybe", ["true or false"]),
        ("lr_sh0=.nan", ["lr_sh0", "nan"]),
        ("lr_sh0=.inf", ["lr_sh0", "inf"]),
        ("final_rate=0", ["final_rate"]),
        ("guidance_scale=-1", ["guidance_scale", "-1"]),
        ("guidance=idz", ["'idz'", "'ids'", "ids, dds, cds, pds, "]),
        ("background=[1, 0]", ["background", "red, green, blue"]),
        ("background=[1, 0, 2]", ["background", "[0, 1]"]),
        ("t_range=[0.9, 0.1]", ["t_range", "low < high"]),
        ("t_range=0.5", ["t_range", "brackets"]),
        ("fpr_t_range=[0.3, 1.5]", ["fpr_t_range", "low < high"]),
        ("solver=picard_nul", ["'picard_nul'", "'picard_null'", "grad"]),
        ("fpr_iters=-1", ["fpr_iters", "0 or more"]),
        ("fpr_lambda=-1", ["fpr_lambda", "0.0 or more"]),
        ("fpr_stop=-1", ["fpr_stop", "0.0 or more"]),
        ("timesteps=falling", ["timesteps", "'falling'", "uniform, stratified, annealed"]),
        ("weight=1", ["weight", "'1'", "uniform, sigma2"]),
        ("pds_stride=0", ["pds_stride", "found 0"]),
        ("cds_weight=-1", ["cds_weight", "-1", "0.0 or more"]),
        ("fpr_lambda=-1", ["fpr_lambda", "-1", "0.0 or more"]),
        ("sdi_scale=.nan", ["sdi_scale", "nan"]),
        ("t_range=[-0.1, 0.5]", ["t_range", "0 <= low"]),
        ("t_range=[0.5, 1.5]", ["t_range", "high <= 1"]),
        ("up=y", ["up", "'y'", "+x, -x"]),
        ("device=gpu", ["device", "'gpu'", "cuda"]),
        ("cameras=transforms.json", ["cameras", "transforms.json", "dome:N"]),
        ("cameras=dome:0", ["dome:0", "1 to 1000"]),
        ("cameras=dome:x", ["dome:x"]),
    ],
)
def test_a_mistake_is_one_line_that_helps(word, words_of_the_message):
    with pytest.raises(InputError) as error:
        load_config(words=[word])
    assert "\n" not in str(error.value)
    for words in words_of_the_message:
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stepz: 3", ["c.yaml", "'stepz'", "'steps'"]),
        ("steps: [1", ["c.yaml", "line"]),
        ("- a", ["c.yaml", "key: value"]),
        ("steps: fast", ["c.yaml", "steps", "'fast'"]),
    ],
)
def test_a_mistake_in_the_file_names_the_file(text, words, tmp_path):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as error:
        load_config(tmp_path / "c.yaml")
    assert all(word in str(error.value) for word in words)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match="nothing.yaml: cannot be read"):
        load_config(tmp_path / "nothing.yaml")


def test_rigs_with_and_without_a_number():
    assert rig("dome") == rig("auto") == ("dome", None) and rig("orbit:12") == ("orbit", 12)
    assert all(map(is_rig, ("auto", "dome", "orbit:12"))) and not is_rig("transforms.json") and not is_rig("data/dome")


def test_every_key_has_a_sentence_and_text_keys_are_text():
    assert all(KEYS.values())
    assert {f.name for f in fields(Config) if str(f.type).startswith("str")} == set(TEXT)


def test_defaults_are_those_of_the_code_below():
    from splatedit.cameras import RIGS as rigs
    from splatedit.cameras import UPS as ups
    from splatedit.captures import EVERY, MOST
    from splatedit.editing import edit
    from splatedit.fpr import SOLVERS as solvers
    from splatedit.guidance import GUIDANCE
    from splatedit.score import WEIGHTS as weights
    from splatedit.tuning import NEEDS

    assert tuple(WEIGHTS) == tuple(weights) and tuple(SOLVERS) == tuple(solvers) and set(NEEDS) == set(GUIDANCE)
    assert set(GUIDANCES) == set(GUIDANCE) and set(RIGS) == set(rigs) and tuple(UPS) == tuple(ups)
    defaults = {k: p.default for k, p in inspect.signature(edit).parameters.items()}
    ours = {k: tuple(v) if isinstance(v, list) else v for k, v in asdict(Config()).items()}
    assert (ours["cameras"], defaults["cameras"]) == ("auto", "dome"), "a run can look beside its file, `edit` cannot"
    assert (ours["cameras_held_out"], ours["cameras_most"]) == (EVERY, MOST) and defaults["views"] == MOST
    for name in defaults.keys() & ours.keys() - {"prompt", "cameras"}:
        assert ours[name] == defaults[name], name
    for name, value in defaults["rates"]._asdict().items():
        assert ours[f"lr_{name}"] == value, name
    for name, value in defaults["tuning"]._asdict().items():
        assert ours[name] == value, name
    assert (ours["anchor"], ours["outside"]) == defaults["hold"][:2]
    grown = ("grow_percent", "grow_every", "grow_range", "max_gaussians", "prune_opacity")
    assert tuple(ours[name] for name in grown) == defaults["growth"]
    # every setting of the edit can be reached from the command line
    assert defaults.keys() - ours.keys() == {
        *("gaussians", "source", "views", "rates", "tuning"),
        *("hold", "growth", "resume"),
    }


def test_a_preset_stands_for_settings_that_may_be_given_beside_it(tmp_path):
    plain, fast = load_config(), load_config(options={"preset": "fast"})
    assert plain == load_config(words=["preset=paper"]) == Config()
    assert {k for k in KEYS if getattr(plain, k) != getattr(fast, k)} <= {"preset", *PRESETS["fast"]}
    assert all(getattr(fast, k) == v for k, v in PRESETS["fast"].items())
    (tmp_path / "mine.yaml").write_text("preset: fast\nfpr_iters: 5\n")
    mine = load_config(tmp_path / "mine.yaml", words=["source_cache=4"])
    assert (mine.solver, mine.fpr_iters, mine.source_cache) == (PRESETS["fast"]["solver"], 5, 4)
    again = load_config(tmp_path / "mine.yaml", {"preset": "paper"})
    assert again == Config()
    with pytest.raises(InputError, match=r"preset: 'fats' is not known \(did you mean 'fast'"):
        load_config(options={"preset": "fats"})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_sound_and_say_the_same_settings(name):
    assert PRESETS[name].keys() == PRESETS["paper"].keys()
    assert all(typed(key, value) == value for key, value in PRESETS[name].items())
