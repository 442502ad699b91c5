"""Other run times on a GPU: ONNX Runtime's own CPU provider in the place of CUDA's, and packages that are not there."""

import gzip
import json
import sys
import types

import numpy as np
import pytest

from benchmarks import cuda, cuda_peers, cuda_prepare

onnxruntime = pytest.importorskip("onnxruntime")
MODEL = cuda_prepare.half(cuda_prepare.convolution(5, 6, 8, 4)).SerializeToString()


def rows():
    """``(write, what was written)``."""
    found = []
    return lambda name, **facts: found.append((name, facts)), found


@pytest.fixture
def prepared(tmp_path):
    """A folder with one convolution for peers."""
    (tmp_path / "peers").mkdir()
    (tmp_path / "peers" / "conv.onnx.gz").write_bytes(gzip.compress(MODEL))
    entry = dict(name="conv", file="conv.onnx.gz", batches=[3, 1], operations=2 * 5 * 6 * 8 * 4 * 9)
    (tmp_path / "peers" / "peers.json").write_text(json.dumps([entry]))
    return tmp_path


def test_bound_memory_is_what_the_network_reads_and_writes():
    """Of any batch, in the file's types: the result in the bound memory is that of an ordinary run."""
    run = cuda_peers.ort_run(MODEL, "CPUExecutionProvider", 3, "cpu")
    run.start()
    run.wait()
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    given = run.given.numpy()
    assert given.dtype == np.float16 and given.shape == (3, 8, 5, 6) and np.unique(given).size > 100
    np.testing.assert_array_equal(run.results[0].numpy(), session.run(None, {"input": given})[0])
    assert run.facts["version"] == onnxruntime.__version__


def test_a_provider_that_is_not_there_is_a_fact(prepared):
    """One line, and no failure."""
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("ONNX Runtime has CUDA here")
    for step in (cuda.step_ort_cuda, cuda.step_ort_tensorrt):
        write, found = rows()
        step(prepared, write)
        ((name, facts),) = found
        assert name == "conv" and facts["why"].startswith("not present: onnxruntime") and "CPUExecutionProvider" in facts["why"]


def test_packages_that_are_not_there_are_facts(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr(cuda.cuda_device, "Device", lambda: None)
    for step in (cuda.step_ort_cuda, cuda.step_tensorrt):
        write, found = rows()
        step(prepared, write)
        assert len(found) == 1 and found[0][1]["why"].startswith("not present")


def test_without_prepared_networks_a_step_is_skipped(tmp_path):
    write, found = rows()
    cuda.step_ort_cuda(tmp_path, write)
    assert [name for name, _ in found] == ["skipped"]


class FakeSession:
    """A session of a package whose captured graphs, and processor-only operators, are as ``working`` says."""

    def __init__(self, model, settings, providers):
        (self.provider, self.options), *_ = providers
        self.entries, self.runs = settings.entries, 0
        FakeSession.tried.append((self.options, cuda_peers.ON_DEVICE_ONLY in self.entries))
        if cuda_peers.ON_DEVICE_ONLY in self.entries and not FakeSession.all_on_device:
            raise RuntimeError("an operator has no kernel\nand more")

    def get_providers(self):
        return [self.provider if FakeSession.starts else "CPUExecutionProvider"]

    def get_inputs(self):
        return [types.SimpleNamespace(name="x", shape=["N", 4], type="tensor(float16)")]

    get_outputs = get_inputs

    def io_binding(self):
        nothing = lambda *args: None  # noqa: E731
        return types.SimpleNamespace(bind_ortvalue_input=nothing, bind_ortvalue_output=nothing, synchronize_outputs=lambda: None)

    def run_with_iobinding(self, binding, how):
        assert how.entries == {"disable_synchronize_execution_providers": "1"}
        if "enable_cuda_graph" in self.options and not FakeSession.graphs:
            raise RuntimeError("cannot capture")
        self.runs += 1


class FakeSettings:
    def __init__(self):
        self.entries = {}

    def add_session_config_entry(self, key, value):
        self.entries[key] = value

    add_run_config_entry = add_session_config_entry


class FakeValue:
    places = []

    @classmethod
    def ortvalue_from_numpy(cls, array, place, number):
        cls.places.append((array.shape, str(array.dtype), place))

    @classmethod
    def ortvalue_from_shape_and_type(cls, shape, dtype, place, number):
        cls.places.append((tuple(shape), str(dtype), place))


@pytest.fixture
def package(monkeypatch):
    """A package with CUDA."""
    made = types.SimpleNamespace(
        __version__="9", SessionOptions=FakeSettings, RunOptions=FakeSettings, InferenceSession=FakeSession, OrtValue=FakeValue,
        get_available_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"],
    )  # fmt: skip
    FakeSession.tried, FakeSession.starts, FakeSession.graphs, FakeSession.all_on_device, FakeValue.places = [], True, True, True, []
    monkeypatch.setitem(sys.modules, "onnxruntime", made)


def test_memory_is_on_the_device_and_the_first_options_are_taken(package, prepared):
    run = cuda_peers.ort_run(b"", "CUDAExecutionProvider", 64)
    assert set(FakeValue.places) == {((64, 4), "float16", "cuda")} and len(FakeSession.tried) == 1
    assert run.facts == dict(version="9", options="enable_cuda_graph=1 cudnn_conv_algo_search=EXHAUSTIVE prefer_nhwc=1", all_on_device=True)
    write, found = rows()
    cuda.step_ort_cuda(prepared, write)
    assert [facts["batch"] for _, facts in found] == [3, 1] and all(facts["tops"] > 0 and facts["ms"] > 0 for _, facts in found)


def test_what_cannot_be_captured_runs_without_a_graph(package):
    FakeSession.graphs = False
    assert cuda_peers.ort_run(b"", "CUDAExecutionProvider", 1).facts["options"] == "cudnn_conv_algo_search=EXHAUSTIVE"


def test_operators_of_the_processor_are_told(package):
    FakeSession.all_on_device = False
    assert cuda_peers.ort_run(b"", "CUDAExecutionProvider", 1).facts["all_on_device"] is False


def test_a_provider_that_falls_back_to_the_processor_is_not_measured(package, prepared):
    """Its package is there, its libraries are not: said for every batch."""
    FakeSession.starts = False
    write, found = rows()
    cuda.step_ort_cuda(prepared, write)
    assert len(found) == 2 and all("CUDAExecutionProvider does not start" in facts["why"] and "ms" not in facts for _, facts in found)


def test_the_clock():
    """Runs that follow one another take what their starts take; one alone also takes the wait."""
    now = [0.0]

    def take(seconds):
        now[0] += seconds

    seconds, latency = cuda_peers.measure(cuda_peers.Run(lambda: take(1.0), lambda: take(3.0)), lambda: now[0])
    assert latency == 4.0 and seconds == pytest.approx((2 * 1.0 + 3.0) / 2)


class FakeTensorRT(types.ModuleType):
    """As much of the package as is called; results are twice the input."""

    __version__, ERROR = "99", 0

    def __init__(self, good=True):
        super().__init__("tensorrt")
        self.good, self.shapes, self.addresses = good, {}, {}
        for name in ("Builder", "OnnxParser", "Runtime"):
            setattr(self, name, lambda *args: self)
        self.Logger = type("Logger", (), {"ERROR": 0, "__init__": lambda _self, level: None})
        self.NetworkDefinitionCreationFlag = types.SimpleNamespace(STRONGLY_TYPED=3)
        self.num_errors, self.num_io_tensors, self.name = 1, 2, "input"

    @property
    def shape(self):
        return (-1, 8, 5, 6)

    def create_network(self, flags):
        assert flags == 8
        return self

    def parse(self, model):
        return self.good

    def get_error(self, number):
        return "an operator is not known"

    def get_input(self, number):
        return self

    def create_builder_config(self):
        return self

    create_optimization_profile = create_execution_context = create_builder_config

    def set_shape(self, name, *shapes):
        self.shapes[name] = shapes

    def add_optimization_profile(self, profile):
        assert profile.shapes["input"] == ([3, 8, 5, 6],) * 3

    def build_serialized_network(self, network, config):
        return b"plan"

    def deserialize_cuda_engine(self, plan):
        return self

    def set_input_shape(self, name, shape):
        self.batch = shape[0]

    def get_tensor_name(self, number):
        return ("input", "output")[number]

    def get_tensor_shape(self, name):
        return (self.batch, {"input": 8, "output": 4}[name], 5, 6)

    def get_tensor_dtype(self, name):
        return np.float16

    def nptype(self, dtype):
        return dtype

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        assert stream == 7 and set(self.addresses) == {"input", "output"}
        return True


class FakeDevice:
    """Hands out addresses; a graph is the function that was recorded."""

    stream, records = 7, True

    def __init__(self):
        self.driver, self.uploaded, self.launched = self, [], 0

    def upload(self, array):
        self.uploaded.append((array.shape, str(array.dtype)))
        number = len(self.uploaded)
        return types.SimpleNamespace(data_ptr=lambda: number)

    def synchronize(self, stream):
        pass

    def record(self, work, stream):
        if not self.records:
            raise RuntimeError("not while recording")
        work()
        return work

    def launch(self, graph, stream):
        self.launched += 1
        graph()


@pytest.mark.parametrize("records, graph", [(True, "recorded"), (False, "RuntimeError: not while recording")])
def test_tensorrt(monkeypatch, records, graph):
    """An engine for the batch, memory of its types, a graph where it can be recorded."""
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    device = FakeDevice()
    device.records = records
    run = cuda_peers.tensorrt_run(MODEL, 3, device)
    run.start()
    run.wait()
    assert run.facts == dict(version="99", graph=graph) and device.launched == records
    assert device.uploaded == [((3, 8, 5, 6), "float16"), ((3, 4, 5, 6), "float16")]


def test_tensorrt_that_cannot_read_the_network(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT(good=False))
    with pytest.raises(cuda_peers.Missing, match="an operator is not known"):
        cuda_peers.tensorrt_run(MODEL, 3, FakeDevice())


def test_what_is_prepared(tmp_path):
    """Half-precision files that numpy and ONNX Runtime read, for the batches and layers of PyTorch."""
    cuda_prepare._peers(types.SimpleNamespace(folder=tmp_path), None)
    index = json.loads((tmp_path / "peers" / "peers.json").read_text())
    assert [entry["batches"] for entry in index] == [[256, 64, 1], *([layer[-1]] for layer in cuda_prepare.CONVOLUTIONS)]
    assert sum((tmp_path / "peers" / entry["file"]).stat().st_size for entry in index) < 12 << 20
    model = gzip.decompress((tmp_path / "peers" / index[0]["file"]).read_bytes())
    run = cuda_peers.ort_run(model, "CPUExecutionProvider", 1, "cpu")
    assert run.results[0].numpy().shape == (1, 1000) and run.results[0].numpy().dtype == np.float16
