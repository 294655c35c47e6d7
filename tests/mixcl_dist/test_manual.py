"""`mixcl config show` is a file that can be read again, and says of each setting what it is, may be and is from."""

import pytest
import yaml

from mixcl_dist.config import ConfigError, layers, load, recipe_names, to_dict
from mixcl_dist.manual import manual


def shown(section=None, files=(), recipe=None, overrides=()):
    given = {"recipe": recipe, "overrides": overrides}
    return manual(load(*files, **given), layers(*files, **given), section)


@pytest.mark.parametrize("recipe", [None, *recipe_names()])
def test_the_page_is_the_configuration(recipe):
    overrides = [("study.search", "{finetune.learning_rate: {loguniform: [0.001, 0.01]}}")]
    page = shown(recipe=recipe, overrides=overrides)
    assert yaml.safe_load(page) == to_dict(load(recipe=recipe, overrides=overrides))


def test_the_page_is_a_file_to_give_as_config(tmp_path):
    file = tmp_path / "page.yaml"
    file.write_text(shown(recipe="few_label"))
    assert load(file) == load(recipe="few_label")


def test_each_value_has_its_bounds_and_where_it_is_from(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("pretrain: {steps: 7, batch_size: 4}\n")
    page = shown(files=[file], recipe="few_label", overrides=[("pretrain.steps", "9")])
    lines = [line.strip() for line in page.splitlines()]
    assert "steps: 9  # 1 to 100000000; command line" in lines
    assert f"batch_size: 4  # 1 to 1000000; {file}" in lines
    assert "crop_identity: 0.0  # 0 to 1000000.0; recipe few_label" in lines
    assert "overlap: 0.25  # 0 to below 1; default" in lines
    assert lines[lines.index("overlap: 0.25  # 0 to below 1; default") - 1].startswith("# Smallest share of a patch")


def test_a_section_is_explained_in_full_and_by_itself():
    page = shown("rows")
    assert list(yaml.safe_load(page)) == ["rows"]
    assert "at most one voxel in" in page and "at most one voxel in" in shown()
    assert "a thirtieth of the" in shown("objective") and "a thirtieth of the" not in shown()


def test_a_section_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"no section view; sections: build, data, .*views"):
        shown("view")
