"""One typed tree: defaults, recipe, file, overrides; what is unknown is refused by its nearest name."""

import ast
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mixcl_dist import config
from mixcl_dist.config import ConfigError


def test_later_wins_over_earlier(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("pretrain: {steps: 7, batch_size: 4}\nviews: {size: [16, 16, 16]}\n")
    resolved = config.load(file, overrides=[("pretrain.steps", "9"), ("optimizer.learning_rate", "1e-3")])
    assert (resolved.pretrain.steps, resolved.pretrain.batch_size) == (9, 4)
    assert resolved.views.size == (16, 16, 16)
    assert resolved.optimizer.learning_rate == 1e-3


@pytest.mark.parametrize("text", ["24,24,16", "[24, 24, 16]"])
def test_lists_are_given_either_way(text):
    assert config.load(overrides=[("views.size", text)]).views.size == (24, 24, 16)


def test_a_list_of_one_needs_no_brackets():
    study = config.load(overrides=[("study.seeds", "3"), ("study.fractions", "0.5")]).study
    assert (study.seeds, study.fractions) == ((3,), (0.5,))
    one, two, none = (config.load(overrides=[("budget.classes", text)]) for text in ("liver", "liver,spleen", "null"))
    assert one.budget.classes == ("liver",) and two.budget.classes == ("liver", "spleen")
    assert none.budget.classes is None


def test_a_budget_by_share_and_by_number_is_refused():
    with pytest.raises(ConfigError, match=r"^budget: fraction 0.1 and scans 4 are both given; set one of them$"):
        config.load(overrides=[("budget.fraction", "0.1"), ("budget.scans", "4")])


def test_what_is_shown_can_be_read_again(tmp_path):
    first = config.load(overrides=[("study.search", "{finetune.learning_rate: {loguniform: [0.001, 0.01]}}")])
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(first))
    assert config.load(file) == first


@pytest.mark.parametrize("name", config.recipe_names())
def test_every_recipe_resolves(name):
    changed = yaml.safe_load(config.recipe_path(name).read_text())
    shown = config.to_dict(config.load(recipe=name))
    assert holds(shown, changed)


def holds(tree, part):
    """Whether `part` is in `tree`, key by key."""
    if not isinstance(part, dict):
        return tree == part
    return all(key in tree and holds(tree[key], value) for key, value in part.items())


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("pretrain.step", "3", "did you mean pretrain.steps?"),
        ("pretrian.steps", "3", "did you mean pretrain"),
        ("pretrain.steps", "many", "pretrain.steps = 'many'"),
        ("pretrain.steps", "0", "pretrain.steps = 0"),
        ("pretrain.steps", "2.5", "pretrain.steps = 2.5"),
        ("views.size", "16,16", "views.size"),
        ("engine.zero_stage", "4", "engine.zero_stage = 4"),
        ("pretrain.trackers", "mlflow,mlflow", "mlflow comes twice"),
        ("engine", "{offload_optimizer: true, zero_stage: 0}", "offload_optimizer is for ZeRO"),
        ("build.overlap", "1.5", "overlap"),
        ("pretrain", "3", "pretrain"),
    ],
)
def test_bad_keys_and_values_are_one_line(key, value, said):
    with pytest.raises(ConfigError) as refused:
        config.load(overrides=[(key, value)])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def resolved(part):
    return config.schema()["$defs"][part["$ref"].rpartition("/")[2]] if "$ref" in part else part


def fields(part, key=""):
    """Dotted key and schema of every setting, those of sections within a section too."""
    for name, value in resolved(part)["properties"].items():
        inner = f"{key}.{name}" if key else name
        if "properties" in resolved(value):
            yield from fields(value, inner)
        else:
            yield inner, value


def numbers(part):
    """A path and the schema of every number in a setting: within lists, tables and what may be left out."""
    part = resolved(part)
    if part.get("type") in ("integer", "number") and "enum" not in part:
        yield (), part
    for choice in part.get("anyOf", ()):
        yield from numbers(choice)
    inner = [*part.get("properties", {}).items(), *enumerate(part.get("prefixItems", ()))]
    inner += [(0, part.get("items")), ("x", part.get("additionalProperties"))]
    for place, item in inner:
        if isinstance(item, dict):
            yield from (((place, *path), number) for path, number in numbers(item))


FIELDS = dict(fields(config.schema()))
NUMBERS = [(key, *number) for key, part in FIELDS.items() for number in numbers(part)]


UNITS = (
    "mm|hu|s|seconds|voxels?|degrees|shares?|steps?|factor|weight|numbers?|processes|patches|passes|scans|crops|often|channels|"
    "width|cores|gpus|trials|checkpoints|norm|bytes|decay|cosines|points|dice|draws|resamples|error|subsets"
)


@pytest.mark.parametrize("key", FIELDS)
def test_every_setting_is_explained_in_its_unit(key):
    said = FIELDS[key].get("description", "")
    assert said.strip(), f"{key} has no docstring"
    if paths := [path for path, _ in numbers(FIELDS[key])]:
        words = re.findall("[a-z]+", f"{key} {paths} {said}".lower())
        assert any(re.fullmatch(UNITS, word) for word in words), f"{key}: in what is it given?"


def bounds(number):
    """Least and greatest value, and whether these may be taken themselves; raises `KeyError` where one is missing."""
    low = number["minimum"] if "minimum" in number else number["exclusiveMinimum"]
    high = number["maximum"] if "maximum" in number else number["exclusiveMaximum"]
    return low, high, "minimum" in number, "maximum" in number


@pytest.mark.parametrize(("key", "path", "number"), NUMBERS)
def test_every_number_has_bounds(key, path, number):
    low, high, *_ = bounds(number)
    assert -math.inf < low < high < math.inf


def replaced(value, path, number):
    """`value` with a number put in its place; what is left out or empty is made from the path."""
    if not path:
        return number
    place, *rest = path
    if isinstance(place, int):
        items = list(value) if value else [1, 1, 1]
        items[place] = replaced(items[place], rest, number)
        return items
    known = dict(value or ({"folder": "f", "max_bytes": 1} if place in ("folder", "max_bytes") else {}))
    return known | {place: replaced(known.get(place), rest, number)}


def set_to(key, path, number):
    value = config.to_dict(config.Config())
    for name in key.split("."):
        value = value[name]
    return config.replace(config.Config(), {key: replaced(value, path, number)})


@settings(max_examples=200)
@given(where=st.sampled_from(NUMBERS), beyond=st.data())
def test_no_number_out_of_its_bounds_is_accepted(where, beyond):
    key, path, number = where
    low, high, takes_low, takes_high = bounds(number)
    if number["type"] == "integer":
        wrong = st.integers(max_value=low - takes_low) | st.integers(min_value=high + takes_high) | st.floats()
        wrong |= st.sampled_from([True, False])
    else:
        below = st.floats(max_value=low, exclude_max=takes_low)
        wrong = below | st.floats(min_value=high, exclude_min=takes_high) | st.just(math.nan)
    with pytest.raises(ConfigError) as refused:
        set_to(key, path, beyond.draw(wrong))
    assert str(refused.value).startswith(key) and "\n" not in str(refused.value)


WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
"""A file holds no half of a surrogate pair."""


def values(part):
    """Values of a schema within its bounds."""
    part = resolved(part)
    if "anyOf" in part:
        return st.one_of(*map(values, part["anyOf"]))
    if "enum" in part:
        return st.sampled_from(part["enum"])
    if part.get("type") == "object" and "properties" in part:
        return st.fixed_dictionaries({}, optional={name: values(item) for name, item in part["properties"].items()})
    if "prefixItems" in part:
        return st.tuples(*map(values, part["prefixItems"]))
    if part.get("type") == "array":
        return st.lists(values(part["items"]), min_size=part.get("minItems", 0), max_size=part.get("maxItems", 4))
    if part.get("type") in ("integer", "number"):
        low, high, takes_low, takes_high = bounds(part)
        if part["type"] == "integer":
            return st.integers(low + (not takes_low), high - (not takes_high))
        return st.floats(low, high, exclude_min=not takes_low, exclude_max=not takes_high)
    if part.get("type") == "object":
        inner = part.get("additionalProperties")
        return st.dictionaries(WORDS, values(inner) if isinstance(inner, dict) else st.integers() | WORDS, max_size=2)
    return {"string": WORDS, "boolean": st.booleans(), "null": st.none()}[part["type"]]


@settings(suppress_health_check=[HealthCheck.too_slow], max_examples=30)
@given(tree=values(config.schema()))
def test_every_accepted_configuration_is_read_back_from_its_file(tree, tmp_path_factory):
    try:
        accepted = config.from_dict(tree)
    except ConfigError as refused:  # of two values that do not go together
        assert "\n" not in str(refused)
        return
    file = tmp_path_factory.mktemp("run") / "config.yaml"
    file.write_text(config.to_yaml(accepted))
    assert config.load(file) == accepted


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("checkpoint.every", "0", "checkpoint.every = 0"),
        ("checkpoint.keep", "0", "checkpoint.keep = 0"),
        ("checkpoint.keep", "-1", "checkpoint.keep = -1"),
        ("engine.accumulation_steps", "0", "engine.accumulation_steps = 0"),
        ("pretrain.seed", "-1", "pretrain.seed = -1"),
        ("budget.seed", "4294967296", "budget.seed = 4294967296"),
        ("network.window_hu", "40,40", "both edges are 40"),
        ("network.window_hu", "300,-100", "300 is above -100"),
        ("views.scale", "1.1,0.9", "1.1 is above 0.9"),
        ("data.upsampling", "{x: 1e9}", "data.upsampling.x = '1e9'"),
        ("optimizer.betas", "0.9,1", "optimizer.betas.1 = 1"),
        ("optimizer.learning_rate", ".inf", "finite"),
        ("finetune.sliding_overlap", "1", "finetune.sliding_overlap = 1"),
        ("study.seeds", "3,3", "3 comes twice"),
        ("budget.development", "a,b,a", "a comes twice"),
        ("pretrain.steps", "yes", "pretrain.steps = True"),
        ("network.filters", "8,16", "network.filters = [8, 16]: should have at least 3 items, not 2"),
    ],
)
def test_values_that_would_only_fail_later_are_refused(key, value, said):
    with pytest.raises(ConfigError) as refused:
        config.load(overrides=[(key, value)])
    assert said in str(refused.value) and "\n" not in str(refused.value)


def test_a_reconstruction_of_no_voxel_is_refused():
    with pytest.raises(ConfigError, match=r"^objective\.masked_weight is 0 and views\.mask_fraction is 1"):
        config.load(overrides=[("objective.masked_weight", "0"), ("views.mask_fraction", "1")])


def test_missing_and_broken_files_are_named(tmp_path):
    broken = tmp_path / "broken.yaml"
    broken.write_text("pretrain: [")
    for path in (tmp_path / "absent.yaml", broken):
        with pytest.raises(ConfigError, match=path.name):
            config.load(path)
    with pytest.raises(ConfigError, match="did you mean"):
        config.load(recipe="few_labels")


def test_reading_the_configuration_imports_no_torch():
    program = "import sys, mixcl_dist.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def readers():
    """What the code reads of anything, with the name before it: of `config.views.size`, `views["size"]` views.size."""
    package = Path(config.__file__).parent
    folders = [package, *(entry.resolve() for entry in package.iterdir() if entry.is_symlink())]
    found = set()
    for path in (path for folder in folders for path in folder.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute | ast.Subscript) and isinstance(node.ctx, ast.Load):
                owner = getattr(node.value, "attr", getattr(node.value, "id", ""))
                name = node.attr if isinstance(node, ast.Attribute) else getattr(node.slice, "value", "")
                found.add(f"{owner}.{name}")
    return found


ALIASES = ("config", "settings", "section", "self", "budget", "table", "others")
"""Names that a section goes by where it alone is handed on."""


def test_no_setting_is_without_a_reader():
    read = readers()
    for key in FIELDS:
        *_, section, name = key.split(".")
        assert any(f"{owner}.{name}" in read for owner in (section, *ALIASES)), f"{key} is read by nobody"
