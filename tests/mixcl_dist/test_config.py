"""One typed tree: defaults, recipe, file, overrides; what is unknown is refused by its nearest name."""

import subprocess
import sys

import pytest
import yaml

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
        ("build.overlap", "1.5", "overlap"),
        ("pretrain", "3", "pretrain"),
    ],
)
def test_bad_keys_and_values_are_one_line(key, value, said):
    with pytest.raises(ConfigError) as refused:
        config.load(overrides=[(key, value)])
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


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
