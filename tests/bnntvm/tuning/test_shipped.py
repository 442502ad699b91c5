"""The records that the package ships: whole, and usable or passed over."""

import json

import pytest

from bnntvm.schedules.families import DEPTHWISE, FAMILIES
from bnntvm.targets import registry
from bnntvm.tuning import records, report

FOLDER = records.shipped()
pytestmark = pytest.mark.skipif(FOLDER is None, reason="a checkout without records")


def test_every_line_is_a_record_of_a_known_task():
    found, bad = records.read(FOLDER)
    keys = records.keys(FOLDER)
    assert found and not bad
    for record in found:
        content = json.loads(keys[record.task])
        assert records.task_id(keys[record.task]) == record.task and content["format"] == records.FORMAT
        assert content["family"] in {*FAMILIES.values(), *DEPTHWISE.values()}
        assert record.isa in registry.names() and record.threads == 1 and record.machine and not record.failed


def test_every_winner_is_clearly_faster_than_the_default_beside_it():
    summaries, _ = report.summarise(FOLDER)
    for one in summaries:
        assert one.measured == 2 and one.gain > records.LEAST_GAIN, one.name
