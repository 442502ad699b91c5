"""Rows of NVIDIA's compute capabilities, and what users write for them."""

import pytest

from bnntvm.targets import cuda, registry, x86


def test_every_row_is_found_by_its_name():
    for level in cuda.LEVELS:
        assert registry.resolve(level.name) is level and registry.resolve({"kind": "cuda", "arch": level.name}) is level
        assert registry.resolve(level) is level and level.machine == "cuda" and level.name in registry.names()


@pytest.mark.parametrize("arch, mma, operation", [
    ("sm_75", (8, 8, 128), "xor"), ("sm_80", (16, 8, 256), "and"), ("sm_86", (16, 8, 256), "and"), ("sm_90", (16, 8, 256), "and"),
    ("sm_88", (16, 8, 256), "and"), ("sm_100", (), ""), ("sm_100a", (), ""), ("sm_120", (), ""), ("sm_120f", (), ""),
])  # fmt: skip
def test_tensor_cores(arch, mma, operation):
    found = registry.resolve(arch)
    assert (found.name, found.mcpu, found.mma, found.operation) == (arch, arch, mma, operation)
    assert not found.wgmma and found.async_copy == (arch != "sm_75")


def test_warpgroups_are_of_one_architecture():
    assert [level.name for level in cuda.LEVELS if level.wgmma] == ["sm_90a"]


@pytest.mark.parametrize("name", ["sm_70", "sm_80a", "sm_", "cuda12", "gpu", "sm_75x", "sm_91", "sm_99", "sm_99a", "sm_90f", "sm_1000"])
def test_what_is_no_target(name):
    assert cuda.resolve(name) is None


def test_other_targets_are_left_alone():
    assert cuda.resolve("x86") is None and cuda.resolve({"kind": "llvm"}) is None and cuda.resolve(x86.LEVELS[0]) is None


def test_the_device_or_the_default(monkeypatch):
    monkeypatch.setattr(cuda, "device_arch", lambda: None)
    assert registry.resolve("cuda").name == cuda.DEFAULT and registry.resolve({"kind": "cuda"}).name == cuda.DEFAULT
    monkeypatch.setattr(cuda, "device_arch", lambda: "sm_90a")
    assert registry.resolve("cuda").name == "sm_90a"


def test_a_block_fits_into_a_multiprocessor():
    for level in cuda.LEVELS:
        assert level.block_shared_bytes <= level.shared_bytes and level.lanes == 32 and level.threads % 256 == 0
