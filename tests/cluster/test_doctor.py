"""The doctor tries things and tells; it does not fall ill itself."""

from __future__ import annotations

from importlib import metadata

import pytest

from mixcl_dist.cluster import doctor


def test_a_machine_that_runs_these_tests_is_fit():
    findings = {finding.name: finding for finding in doctor.examine()}
    assert findings["engine step"].fit, findings["engine step"].detail
    assert findings["engine step"].detail.startswith("DeepSpeed ZeRO 0 on ")
    assert findings["ray"].fit, findings["ray"].detail
    assert "torch" in findings["packages"].detail


def test_what_breaks_is_a_finding_of_one_line(monkeypatch):
    def broken():
        raise OSError("no such\ndevice")

    monkeypatch.setattr(doctor, "_gpu", broken)
    monkeypatch.setattr(doctor, "_engine_step", lambda: (True, ""))
    monkeypatch.setattr(doctor, "_ray", lambda: (True, ""))
    finding = next(finding for finding in doctor.examine() if finding.name == "gpu")
    assert not finding.fit
    assert finding.detail == "OSError: no such device"


@pytest.mark.parametrize(("platform", "fit"), [("linux", False), ("darwin", True)])
def test_where_there_is_no_triton_none_is_needed(monkeypatch, platform, fit):
    def version(name):
        if name == "triton":
            raise metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(doctor.metadata, "version", version)
    monkeypatch.setattr(doctor.sys, "platform", platform)
    assert doctor._packages() == (fit, "torch 1, deepspeed 1, triton missing, webdataset 1, monai 1, ray 1")
