"""A ledger says what is done, whatever killed the process that wrote it."""

from __future__ import annotations

from mixcl_dist.studies.ledger import Ledger, digest_of, read


def test_an_item_is_missing_then_done_then_stale_or_failed(tmp_path):
    ledger = Ledger(tmp_path / "ledger.jsonl", "a card")
    assert ledger.state("check/x", "1") == "missing"
    ledger.add("check/x", "1", "done")
    assert ledger.state("check/x", "1") == "done"
    assert ledger.state("check/x", "2") == "stale"
    ledger.add("check/x", "2", "failed")
    assert ledger.state("check/x", "2") == "failed"


def test_a_record_is_on_disk_at_once_and_outlives_a_torn_line(tmp_path):
    path = tmp_path / "ledger.jsonl"
    Ledger(path, "a card").add("check/x", "1", "done", text="whole")
    with path.open("a") as file:
        file.write('{"item": "check/y", "dig')  # the process was killed here
    again = Ledger(path, "a card")
    assert again.state("check/x", "1") == "done" and again.state("check/y", "1") == "missing"
    again.add("check/y", "1", "done")
    assert [record["item"] for record in read(path)] == ["check/x", "check/y"]


def test_earlier_results_count_for_their_card_alone(tmp_path):
    for card in ("one", "other"):
        Ledger(tmp_path / card / "ledger.jsonl", card).add("check/x", "1", "done", text=card)
    new = Ledger(tmp_path / "out" / "ledger.jsonl", "one", sorted(tmp_path.glob("o*/ledger.jsonl")))
    assert new.records["check/x"]["text"] == "one"
    assert [record["card"] for record in read(new.path)] == ["one"]  # whole by itself


def test_a_digest_changes_with_sources_that_match_and_with_no_other(tmp_path):
    (tmp_path / "kernel.py").write_text("1")
    first = digest_of(tmp_path, ["*.py"])
    (tmp_path / "notes.md").write_text("other")
    assert digest_of(tmp_path, ["*.py"]) == first
    (tmp_path / "kernel.py").write_text("2")
    assert digest_of(tmp_path, ["*.py"]) != first
    assert digest_of(tmp_path, ["*.py"], "tiny") != digest_of(tmp_path, ["*.py"])


def test_without_a_card_records_of_every_machine_count(tmp_path):
    Ledger(tmp_path / "ledger.jsonl", "a card").add("x", "1", "done")
    assert Ledger(tmp_path / "ledger.jsonl").state("x", "1") == "done"
