"""What is recorded of packages that may not be there."""

from importlib import metadata

from mixcl_dist.data_shards.versions import versions_of


def test_a_package_that_is_absent_is_recorded_as_such():
    assert versions_of(["numpy", "no-such-package"]) == {
        "numpy": metadata.version("numpy"),
        "no-such-package": "not installed",
    }
