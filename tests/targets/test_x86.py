"""What names of processors and levels mean."""

import pytest

from bnntvm.targets import isa, x86


@pytest.mark.parametrize(
    "name, level, vendor",
    [
        ("znver4", "x86-64-v4-vpopcnt", "AMD"), ("znver2", "x86-64-v3", "AMD"), ("icelake-server", "x86-64-v4-vpopcnt", "Intel"),
        ("haswell", "x86-64-v3", "Intel"), ("x86-64-v3", "x86-64-v3", ""), ("x86-64", "x86-64-v2", ""),
    ],
)  # fmt: skip
def test_a_processor_has_a_maker_and_a_level_has_none(name, level, vendor):
    for target in (name, {"kind": "llvm", "mcpu": name}):
        found = x86.resolve(target)
        assert (found.name, found.vendor) == (level, vendor)


def test_this_machine(monkeypatch):
    monkeypatch.setattr(x86, "host_facts", lambda: {"model name": "AMD EPYC 9654 96-Core Processor"})
    assert x86.resolve("x86").vendor == "AMD" and x86.resolve("x86").name == x86.host_level().name
    monkeypatch.setattr(x86, "host_facts", dict)
    assert x86.resolve("x86").vendor == ""
    assert isa.vendor_of("Intel(R) Xeon(R) Platinum 8592+") == "Intel" and isa.vendor_of("") == ""
