"""Recipes from TOML: what a mistake is answered with, overrides, and back to TOML."""

import tomllib
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from actors.errors import RecipeError
from actors.preflight import check_names
from actors.recipe import load_recipe, to_toml
from schemas.recipe import Recipe

MINIMAL = '[policy]\nmodel = "m"\n[data]\nrows = "m:rows"\n'


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "tiny.toml"
    file.write_text(MINIMAL)
    return file


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


# -- reading ---------------------------------------------------------------------------------------


def test_what_is_not_said_has_its_default(path: Path) -> None:
    """And the run is called as the file is."""
    recipe = load_recipe(path)
    assert recipe.name == "tiny"
    assert recipe.policy.model == "m"
    assert recipe.learner == Recipe(policy=recipe.policy).learner


def test_the_recipes_of_this_project_are_readable() -> None:
    """Each of them, and it is written back as it was read."""
    files = sorted(Path(__file__).parents[2].glob("recipes/*.toml"))
    assert files
    for file in files:
        recipe = load_recipe(file)
        assert msgspec.convert(tomllib.loads(to_toml(recipe)), Recipe) == recipe


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[lerner]\nsteps = 3\n", "lerner: no such key; did you mean 'learner'?"),
        ("[learner]\nstep = 3\n", "learner.step: no such key; did you mean 'steps'?"),
        ("[tools]\nxyzzy = 3\n", "tools.xyzzy: no such key; there are: use, format"),
        ('[learner]\nsteps = "many"\n', "learner.steps: Expected `int`, got `str`"),
        ("[learner]\nsteps = -1\n", "learner.steps: Expected `int` >= 0"),
        ("[learner]\ngroup_size = 1\n", "learner.group_size: Expected `int` >= 2"),
        ("[deadlines]\ngen_s = inf\n", "deadlines.gen_s: must be finite, not inf"),
        ("[sampling]\ntemperature = nan\n", "sampling.temperature: "),
        ("[learner]\nlearning_rate = 0\n", "learner.learning_rate: Expected `float` > 0"),
        ('[tools]\nuse = ["python", 3]\n', "tools.use[1]: Expected `str`, got `int`"),
        ('[tools]\ntier = "vm"\n', "tools.tier: Invalid enum value 'vm'"),
        ("learner = 3\n", "learner: Expected `object`, got `int`"),
        ("[learner\n", "not TOML: "),
        ("[evaluation]\npath = 'a.jsonl'\nrows = 'm:f'\n", "evaluation.path: give it or eval"),
        ("[cold_start]\nsteps = 5\n", "cold_start.demonstrations: cold_start.steps needs it"),
        ("[generator]\nengine = 'scripted'\n", "generator.script: the scripted engine needs it"),
        (
            "[learner.correction]\nratio_min = 1.5\n",
            "learner.correction.ratio_min: must be below 1",
        ),
        ("[learner.los]\nx = 1\n", "learner.los: no such key; did you mean 'loss'?"),
        ("[learner.loss]\nclip = 1\n", "learner.loss.clip: no such key; did you mean 'clip_"),
        ("[learner.loss]\nclip_high = inf\n", "learner.loss.clip_high: must be finite, not inf"),
    ],
)
def test_a_mistake_names_the_file_the_key_and_the_fix(path: Path, text: str, says: str) -> None:
    """In one line."""
    before = text if not text.startswith("[") and "=" in text.splitlines()[0] else ""
    path.write_text(before + MINIMAL + ("" if before else text))
    message = refused(path)
    assert message.startswith(f"{path}: ")
    assert says in message


def test_a_model_is_needed(path: Path) -> None:
    """Both the table and its key."""
    path.write_text('[data]\nrows = "m:rows"\n')
    assert "policy" in refused(path)
    path.write_text('[policy]\n[data]\nrows = "m:rows"\n')
    message = refused(path)
    assert "policy" in message
    assert "model" in message


def test_tasks_are_needed_for_steps(path: Path) -> None:
    path.write_text('[policy]\nmodel = "m"\n')
    assert "data.path: no tasks: give it or data.rows" in refused(path)
    assert load_recipe(path, ["learner.steps=0"]).learner.steps == 0
    path.write_text(MINIMAL + 'path = "a.jsonl"\n')
    assert "data.path: give it or data.rows, not both" in refused(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "no.toml"
    assert refused(path) == f"{path}: No such file or directory"
    assert "Is a directory" in refused(tmp_path)


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_text_is_a_recipe_or_refused(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    """Whatever it is."""
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_bytes(text.encode())
    with suppress(RecipeError):
        assert isinstance(load_recipe(path), Recipe)


# -- overrides -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("learner.steps=7", "learner", "steps", 7),
        ("learner.learning_rate=1e-4", "learner", "learning_rate", 1e-4),
        ("policy.model=some/model-1.5B", "policy", "model", "some/model-1.5B"),
        ('policy.model="quoted"', "policy", "model", "quoted"),
        ("policy.model=a=b", "policy", "model", "a=b"),
        ('tools.use=["python", "x:y"]', "tools", "use", ["python", "x:y"]),
        ("tools.tags.python=py", "tools", "tags", {"python": "py"}),
        ("asynchrony.barriers=true", "asynchrony", "barriers", True),
        ("evaluation.path=", "evaluation", "path", ""),
    ],
)
def test_a_key_is_overridden(
    path: Path, override: str, section: str, key: str, value: object
) -> None:
    """TOML values as TOML reads them; a bare word is a string, and need not be quoted twice."""
    assert getattr(getattr(load_recipe(path, [override]), section), key) == value


def test_top_level_keys_and_the_last_word_count(path: Path) -> None:
    recipe = load_recipe(path, ["seed=1", "name=other", "seed=2"])
    assert (recipe.seed, recipe.name) == (2, "other")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("learner.steps", "--set: learner.steps: write key=value, e.g. learner.steps=20"),
        ("=3", "--set: =3: write key=value"),
        ("learner.steps=many", "learner.steps: Expected `int`, got `str`"),
        ("learner.stps=3", "learner.stps: no such key; did you mean 'steps'?"),
        ("policy.model.size=3", "--set: policy.model.size: model is not a table"),
        ("seed.x=3", "seed"),
        (".=3", "no such key"),
    ],
)
def test_a_bad_override_is_named(path: Path, override: str, says: str) -> None:
    assert says in refused(path, override)


# -- writing ---------------------------------------------------------------------------------------


@given(st.from_type(Recipe))
@settings(max_examples=30)
def test_a_recipe_reads_back_from_its_toml(recipe: Recipe) -> None:
    """Every key, whatever characters its text has."""
    assert msgspec.convert(tomllib.loads(to_toml(recipe)), Recipe) == recipe


def test_what_is_printed_is_what_is_read(path: Path) -> None:
    """`--dry-run` prints a recipe that means the same."""
    recipe = load_recipe(path, ['tools.tags={python = "py"}', "learner.learning_rate=3e-7"])
    path.write_text(to_toml(recipe))
    assert load_recipe(path) == recipe
    assert replace(load_recipe(path), seed=1) != recipe


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_that_is_not_installed_is_said(path: Path) -> None:
    """Before anything is started, with what to install."""
    recipe = load_recipe(path, ["generator.engine=vllm", "data.rows=json:loads"])
    with pytest.raises(RecipeError, match=r"generator\.engine: needs vLLM: pip install vllm=="):
        check_names(recipe, "")
