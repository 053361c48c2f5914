"""Recipes: presets, settings by dotted name, rules, YAML files; and what a request makes of them."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mezzotint import Recipe
from mezzotint.errors import ConfigError
from mezzotint.recipes.recipe import Rule, load_recipe, presets
from mezzotint.recipes.request import CalibrationRequest, Request, parse_bytes, resolve_device, resolve_recipe
from mezzotint.registry import GRIDS, ROUNDINGS, TARGETS

MATRICES = [f"model.layers.{i}.{part}" for i in range(2) for part in ("self_attn.q_proj", "mlp.down_proj")]


def refused(text: str, *parts: str) -> None:
    for part in parts:
        assert part in text, text


@pytest.mark.parametrize("name", list(presets()))
def test_every_preset_can_be_built(name: str) -> None:
    recipe = load_recipe(name)
    stages = recipe.stages()
    assert recipe.name == name
    assert recipe.summary
    assert recipe.paper
    assert (stages.grid.kind, stages.rounding.kind) == (recipe.grid["kind"], recipe.rounding["kind"])


def test_the_names_promised() -> None:
    promised = "rtn gptq qep-rtn qep-gptq loaq-rtn loaq-gptq gptaq qronos default"
    assert set(promised.split()) <= presets().keys()


def test_unknown_recipe_has_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"unknown recipe 'gptQ'. Did you mean 'gptq'\? Known: .*rtn"):
        load_recipe("gptQ")


def test_settings_reach_their_stage() -> None:
    changed = resolve_recipe("gptq", bits=3.0, settings={"grid.group_size": 64, "rounding.damping": 0.1})
    stages = changed.stages()
    assert (stages.grid.bits, stages.grid.group_size, stages.rounding.damping) == (3, 64, 0.1)
    assert resolve_recipe("gptq", settings={"grid.group_size": None}).stages().grid.group_size is None


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"grid.group_sise": 64}, ("unknown setting 'grid.group_sise'", "Did you mean 'grid.group_size'?")),
        ({"gird.bits": 3}, ("unknown setting 'gird.bits'", "Did you mean 'grid.…'?")),
        ({"grid": 3}, ("unknown setting 'grid'",)),
        ({"grid.kind": "unifrom"}, ("unknown grid 'unifrom'", "Did you mean 'uniform'?")),
        ({"rounding.kind": "gtpq"}, ("unknown rounding 'gtpq'", "Did you mean")),
        ({"target.kind": "eqp"}, ("unknown target 'eqp'", "Did you mean 'qep'?")),
        ({"grid.bits": 9}, ("grid.bits is 9", "2 to 8")),
        ({"grid.bits": 3.5}, ("'grid.bits'", "3.5", "integer")),
        ({"grid.bits": "many"}, ("'grid.bits'", "'many'", "integer")),
        ({"grid.group_size": 0}, ("grid.group_size is 0", "at least 1")),
        ({"grid.range": "wide"}, ("'grid.range'", "'wide'", "minmax")),
        ({"rounding.damping": -1}, ("damping is -1", "0")),
        ({"target.kind": "qep", "target.alpha": 2}, ("alpha is 2", "from 0 to 1")),
        ({"target.alpha": 0.5}, ("unknown setting 'target.alpha'",)),  # of kind weight, which has none
        ({"transform.strength": 0.5}, ("'transform.strength'", "because transform.kind is none")),
    ],
)
def test_wrong_settings(settings: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_recipe("gptq", settings=settings)
    refused(str(caught.value), *parts)


@pytest.mark.parametrize("bits", [3.25, 0.5, 8.5, float("nan"), float("inf"), -2.5])
def test_whole_bits_only(bits: float) -> None:
    with pytest.raises(ConfigError, match=r"--bits is .* stores whole bits. Use --bits"):
        resolve_recipe("gptq", bits=bits)


def test_another_kind_drops_what_the_old_one_had() -> None:
    tuned = resolve_recipe("gptq", settings={"rounding.damping": 0.5, "grid.bits": 3})
    assert resolve_recipe(tuned, settings={"rounding.kind": "nearest"}).rounding == {"kind": "nearest"}
    assert resolve_recipe(tuned, settings={"rounding.kind": "gptq"}).rounding["damping"] == 0.5
    # whatever the order in which they are written, the kind comes first
    both = resolve_recipe("rtn", settings={"rounding.damping": 0.2, "rounding.kind": "gptq"})
    assert both.rounding == {"kind": "gptq", "damping": 0.2}
    assert both.grid == presets()["rtn"].grid


def test_settings_leave_the_recipe_alone() -> None:
    recipe = load_recipe("gptq")
    before = recipe.model_dump()
    recipe.with_settings({"grid.bits": 2})
    recipe.stages({"rounding.damping": 1.0})
    assert recipe.model_dump() == before
    assert presets()["gptq"].model_dump() == before


def test_first_rule_wins() -> None:
    recipe = Recipe(
        rules=(
            Rule(match="*.0.mlp.*", set={"grid.bits": 8}),
            Rule(match="*.mlp.*", set={"grid.bits": 2}),
            Rule(match="*", keep=True),
        )
    )
    found = [recipe.rule_for(name) for name in MATRICES]
    assert [rule and (rule.set.get("grid.bits"), rule.keep) for rule in found] == [
        (None, True), (8, None), (None, True), (2, None),
    ]  # fmt: skip
    # --keep comes before the recipe's own rules
    kept = resolve_recipe(recipe, keep=("*.0.*",)).rule_for("model.layers.0.mlp.down_proj")
    assert kept is not None
    assert kept.keep


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    recipe = Recipe(rules=(Rule(match="*.mlp.*", keep=True), Rule(match="*.ffn.*", keep=True)))
    with pytest.raises(ConfigError, match=r"pattern '\*.ffn.\*' matches none of the 4 matrices. .*self_attn.q_proj"):
        recipe.check_patterns(MATRICES)
    Recipe(rules=(Rule(match="*", keep=True),)).check_patterns(MATRICES)


def test_a_good_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        """
summary: mine
target: {kind: qep, alpha: 0.25}
grid: {kind: uniform, bits: 3, group_size: null}
rounding: {kind: gptq}
rules:
  - {match: "*.down_proj", set: {grid.bits: 4}}
  - {match: lm_head, keep: false}
""",
        encoding="utf-8",
    )
    recipe = load_recipe(str(path))
    assert (recipe.name, recipe.summary) == ("mine", "mine")
    assert (recipe.stages().target.alpha, recipe.stages().grid.group_size) == (0.25, None)
    assert recipe.rules == (Rule(match="*.down_proj", set={"grid.bits": 4}), Rule(match="lm_head", keep=False))
    assert recipe.stages(recipe.rules[0].set).grid.bits == 4
    assert Recipe(**recipe.model_dump()) == recipe


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("grid: [", ("not valid YAML",)),
        ("- grid\n", ("holds list, not a mapping",)),
        ("", ("not a mapping",)),
        ("gird: {kind: uniform}", ("unknown key 'gird'", "Did you mean 'grid'?")),
        ("rules: [{match: '*', kepe: true}]", ("unknown key 'rules.0.kepe'", "Known: keep, match, set")),
        ("rules: [{keep: true}]", ("rules.0.match", "required")),
        ("rules: {match: '*'}", ("rules",)),
        ("grid: uniform", ("grid", "dictionary")),
        ("grid: {bits: 3}", ("stage 'grid' has no kind", "uniform")),
        ("grid: {kind: uniform, bitz: 3}", ("unknown setting 'grid.bitz'", "'grid.bits'")),
        ("grid: {kind: uniform, bits: 12}", ("grid.bits is 12", "2 to 8")),
        ("rounding: {kind: nearest, damping: 1}", ("unknown setting 'rounding.damping'",)),
    ],
)
def test_broken_files(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_recipe(str(path))
    refused(str(caught.value), *parts)


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        load_recipe(str(tmp_path / "nowhere.yaml"))
    latin = tmp_path / "latin.yml"
    latin.write_bytes("summary: schön".encode("latin-1"))
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_recipe(str(latin))


@given(data=st.data())
def test_settings_survive_the_way_through_a_recipe(data: st.DataObject) -> None:
    bits, size = data.draw(st.integers(2, 8)), data.draw(st.sampled_from([None, "auto", 16, 128]))
    alpha = data.draw(st.floats(0, 1))
    recipe = resolve_recipe("rtn", settings={"grid.bits": bits, "grid.group_size": size, "target.kind": "qep",
                                             "target.alpha": alpha})  # fmt: skip
    stages = Recipe(**recipe.model_dump(mode="json")).stages()
    assert (stages.grid.bits, stages.grid.group_size, stages.target.alpha) == (bits, size, alpha)


def test_kinds_of_recipes_are_registered() -> None:
    for recipe in presets().values():
        assert recipe.grid["kind"] in GRIDS
        assert recipe.rounding["kind"] in ROUNDINGS
        assert recipe.target["kind"] in TARGETS


@pytest.mark.parametrize(
    ("text", "nbytes"), [("0", 0), ("12", 12), ("1kb", 1000), ("1.5GiB", 3 * 2**29), (" 2 MiB ", 2**21), (".5KiB", 512)]
)
def test_sizes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "much", "8 GiBs", "-1GiB", "1e9", "GiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is not a size\. Write for example 8GiB"):
        parse_bytes(text)


def test_wrong_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="--samples is 1; it must be at least 2"):
        CalibrationRequest(samples=1)
    with pytest.raises(ConfigError, match="--seqlen is 4; it must be at least 8"):
        CalibrationRequest(seqlen=4)
    with pytest.raises(ConfigError, match=r"unknown engine 'vlm'. Did you mean 'vllm'\?"):
        Request(model=Path("m"), recipe=load_recipe("rtn"), engine="vlm")
    with pytest.raises(ConfigError, match=r"unknown device 'cudda'. Did you mean 'cuda'\?"):
        resolve_device("cudda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert resolve_device("auto") == resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match="Use --device cpu"):
        resolve_device("cuda")
