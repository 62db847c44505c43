"""The records that come with the package: enough of them, legal, of today's kernels, and what the ladder answers on their boards."""

from collections import Counter
from pathlib import Path

import pytest

from kernels.dispatch import is_current, pick_config
from kernels.variants import is_legal, source_hash
from tuning_db import jsonl
from tuning_db.jsonl import read_jsonl, write_jsonl
from tuning_db.lookup import RecordIndex
from tuning_db.model import TORCH_VARIANT, Source, Tier

FILES = sorted((Path(jsonl.__file__).parent / "shipped").glob("*.jsonl"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_record_is_the_answer_for_its_problem(file):
    devices, records = read_jsonl(file.read_text(encoding="utf-8"))
    index = RecordIndex([("shipped", devices, records)])
    by_uid = {device.uid: device for device in devices}
    for record in records:
        device = by_uid[record.device_uid]
        assert device.arch == file.stem
        assert is_current(record)
        if record.config.variant != TORCH_VARIANT:
            assert is_legal(record.config, record.problem, device), record
            assert source_hash(record.config.variant) == record.source_hash, f"{record.config.variant} changed since: sweep again"
        pick = pick_config(record.problem, device, index=index)
        if record.source is Source.MEASURED:
            assert (pick.tier, pick.config, pick.layer) == (Tier.EXACT, record.config, "shipped")


def test_two_boards_are_covered():
    devices, records = read_jsonl((FILES[0].parent / "sm_90.jsonl").read_text(encoding="utf-8"))
    counts = Counter(record.device_uid for record in records)
    assert {device.name for device in devices} == {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert min(counts.values()) >= 200


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_is_as_an_export_writes_it(file):
    text = file.read_text(encoding="utf-8")
    assert write_jsonl(*read_jsonl(text)) == text
