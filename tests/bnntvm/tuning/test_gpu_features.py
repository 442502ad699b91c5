"""What the cost model sees of candidates for a GPU."""

import numpy as np
import pytest

from bnntvm import spec as sp
from bnntvm.schedules import families
from bnntvm.schedules.cuda import layers
from bnntvm.targets import cuda
from bnntvm.tuning import features, gpu_features, records
from bnntvm.tuning.space import Space
from bnntvm.tuning.task import Operand, Task
from bnntvm.tuning.tasks import extract
from bnntvm.tuning.workload import family_name, key_of
from tests.cuda.run_time import IMAGES

ISA = cuda.level("sm_90a")


@pytest.fixture(scope="module")
def space():
    """Of a 3x3 layer, 56x56x256."""
    spec = sp.BinaryConv2d(sp.Window(56, 56, (3, 3), (1, 1), (1, 1, 1, 1)), 256, 256, epilogue=sp.store("int32", "int32"))
    family = families.of(spec, ISA)
    key = key_of(family, spec, 1)
    data, out = (Operand((1, 56, 56, c), d, growth=(1, 0, 0, 0)) for c, d in ((8, "uint32"), (256, "int32")))
    return Space(Task(records.task_id(key), key, family_name(family), spec, ISA, (data,), (out,), ["a"]), 1, "GPU")


def test_all_candidates_of_all_tasks_have_the_same_features():
    """As many finite numbers, and no two of a task the same; also where a family has schedules of several classes."""
    spaces = {task.id: Space(task, 1, "GPU") for arch in ("sm_90a", "sm_75") for task in extract(IMAGES, cuda.level(arch))}
    extractor, lengths = features.Extractor(spaces), set()
    assert any(len({type(s) for s in one.schedules}) > 1 for one in spaces.values())
    for one in spaces.values():
        vectors = np.concatenate([extractor.vector(one, s) for s in one.schedules])
        assert np.isfinite(vectors).all() and len(np.unique(vectors, axis=0)) == len(one.schedules), one.task.name
        lengths.add(vectors.shape[1])
    assert len(lengths) == 1


def described(space, schedule, images):
    """Named features of a tensor-core schedule at a batch."""
    names = "rows columns threads sums shared ahead steps fetched intensity together waves last blocks full work".split()
    values = gpu_features._tiles(space.task, schedule)
    at = gpu_features.BATCHES.index(images) * len(names)
    return dict(zip(names, values[at : at + len(names)], strict=False))


def test_a_tile_is_described(space):
    """128 x 256 of 64 * 3136 pixels by 256 channels, K = 9 * 256 bits in slabs of 128 bytes, by the numbers that anybody can count."""
    schedule = next(s for s in space.schedules if (s.engine, s.rows, s.columns, s.cluster, s.few) == (layers.WGMMA, 128, 256, 1, 0))
    found = described(space, schedule, 64)
    assert (2 ** found["rows"], 2 ** found["columns"]) == (128, 256)
    assert 2 ** found["blocks"] == pytest.approx(64 * 3136 / 128)
    assert 2 ** found["steps"] == pytest.approx(9 * 256 / 8 / 128 + 0.75), "two slabs and a quarter: three"
    assert 2 ** found["fetched"] == (128 + 256) * 128
    assert 2 ** found["intensity"] == pytest.approx(128 * 256 * 128 * 8 / ((128 + 256) * 128))
    assert found["shared"] <= 1 and found["full"] == 1
    assert found["last"] == pytest.approx(64 * 3136 / 128 / (2 ** found["waves"] * 132 * found["together"]))


def test_few_images_have_their_own_tile(space):
    """With ``few`` another kernel computes small batches."""
    wide = next(s for s in space.schedules if s.engine == layers.WGMMA and s.few == 0 and s.columns == 256)
    narrow = next(s for s in space.schedules if s.engine == layers.WGMMA and s.few and s.columns == 256)
    assert described(space, narrow, 1)["columns"] < described(space, wide, 1)["columns"]
    assert described(space, narrow, 64)["columns"] == described(space, wide, 64)["columns"]
