"""On a real GPU: kernels and networks beside their expected results. Needs a device, its driver, and a compiler; skipped elsewhere."""

import numpy as np
import pytest

import bnntvm
from tests.cuda.network import DIGITS_LIKE
from tests.cuda.test_networks import DATA


def why_not():
    """Why there is nothing to test on, None if there is."""
    from bnntvm.cuda import driver, toolchain

    try:
        driver.load()
    except bnntvm.BnnError as error:
        return str(error).splitlines()[0]
    return None if toolchain.find_compiler() else "no CUDA compiler"


REASON = why_not()
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(REASON is not None, reason=str(REASON))]


def test_kernels(tmp_path):
    """Every family, engine and odd size of the prepared cases."""
    from benchmarks import cuda, cuda_prepare
    from bnntvm.targets import registry

    options = type("Options", (), {"folder": tmp_path})
    cuda_prepare._cases(options, registry.resolve("cuda"))
    found = []
    cuda.step_cases(tmp_path, lambda name, **facts: found.append((name, facts)))
    assert [one for one in found if one[0] == "WRONG"] == []


@pytest.mark.parametrize("name", ["exact_mlp", "exact_resnet"])
def test_exact_networks(name):
    golden, module = np.load(DATA / f"{name}.npz"), bnntvm.build(DATA / f"{name}.onnx", target="cuda")
    for kind in ("rand", "edge", "zeros"):
        feed = {key.removeprefix(f"{kind}/in/"): golden[key] for key in golden if key.startswith(f"{kind}/in/")}
        for _ in range(3):  # kernel by kernel, recorded, replayed
            for output, array in module.run(feed).items():
                np.testing.assert_array_equal(array, golden[f"{kind}/out/{output}"])
    assert module._idle[0].not_recorded is None


@pytest.mark.parametrize("batch", [1, 3, 64])
def test_batches(batch):
    module, here = bnntvm.build(DIGITS_LIKE[0], target="cuda"), bnntvm.build(DIGITS_LIKE[0])
    feed = here.random_feed(batch=batch)
    for name, expected in here.run(feed).items():
        for _ in range(3):
            np.testing.assert_allclose(module.run(feed)[name], expected, atol=1e-4)


def test_arrays_of_pytorch():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("this PyTorch has no CUDA")
    module = bnntvm.build(DIGITS_LIKE[0], target="cuda")
    image = module.random_feed(batch=8)["image"]
    expected = module.run({"image": image})["logits"]
    there = torch.from_numpy(image).cuda()
    for _ in range(5):
        result = torch.from_dlpack(module.run({"image": there}, check_finite=False)["logits"])
        np.testing.assert_array_equal(result.cpu().numpy(), expected)
    there[3, 0, 2, 2] = float("nan")
    with pytest.raises(bnntvm.InputError, match="not finite"):
        module.run({"image": there})


def test_tuning(tmp_path):
    """A short session: nothing that is offered fails, records name the device, and a network built with them computes the same."""
    pytest.importorskip("cloudpickle")
    from bnntvm.cuda import driver
    from bnntvm.tuning import records

    result = bnntvm.tune(DIGITS_LIKE[0], target="cuda", trials=24, database=tmp_path / "db", progress=False)
    found, bad = records.read(tmp_path / "db")
    assert (result.measured, result.failed, bad) == (24, 0, []), (tmp_path / "db" / "failures.json").read_text()
    assert {r.machine for r in found} == {driver.load().name(0)} and any(r.compared for r in found)
    tuned = bnntvm.build(DIGITS_LIKE[0], target="cuda", tuning=tmp_path / "db")
    plain = bnntvm.build(DIGITS_LIKE[0], target="cuda", tuning=False)
    feed = plain.random_feed(batch=3)
    for name, expected in plain.run(feed).items():
        np.testing.assert_allclose(tuned.run(feed)[name], expected, atol=1e-4)
