"""The model zoo: valid ONNX, the published sizes, and signs that are alive."""

import numpy as np
import onnx
import onnxruntime
import pytest

from benchmarks import zoo  # noqa: E402

# Binary MACs, float MACs, parameters; None where no figure was published. MACs of MeliusNet, ReActNet and Real-to-Binary are the tables of
# their papers, parameters are Larq Zoo's, the rest is the sum over each paper's table of layers.
PUBLISHED = {
    "binary_resnet_e18": (1.676e9, 1.38e8, 11_699_368),
    "birealnet18": (1.676e9, 1.38e8, 11_699_112),
    "quicknet_small": (1.156e9, None, 12_655_688),
    "quicknet": (1.850e9, None, 13_234_640),
    "quicknet_large": (3.699e9, None, 23_342_248),
    "binary_densenet28": (3.59e9, None, 5_150_504),
    "meliusnet22": (4.62e9, 1.35e8, None),
    "xnornet_alexnet": (1.026e9, None, 62_396_768),
    "binarynet_vgg": (0.613e9, None, 14_022_016),
    "reactnet_a": (4.82e9, 0.12e8, None),
    "real_to_binary18": (1.676e9, 1.38e8, None),
}


@pytest.fixture(scope="module", params=zoo.NAMES)
def network(request):
    return request.param, zoo.build(request.param)


def run_signs(model, images):
    """Outputs of the model and of every operator that ends a binarisation."""
    probed = onnx.ModelProto()
    probed.CopyFrom(model)
    consumers = {i: n.op_type for n in model.graph.node for i in n.input}
    names = [
        n.output[0] for n in model.graph.node if n.op_type in ("Sign", "Where") and consumers.get(n.output[0]) in ("Conv", "MatMul", "Pad")
    ]
    for name in names:
        probed.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(probed.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output, *signs = session.run(None, {"input": images})
    return output, dict(zip(names, signs))


def test_sizes_are_the_published_ones(network):
    name, model = network
    binary, float_, parameters = PUBLISHED[name]
    size = zoo.size_of(model)
    assert size.binary_macs == pytest.approx(binary, rel=0.01)
    if float_:
        assert size.float_macs == pytest.approx(float_, rel=0.02)
    if parameters:
        assert size.parameters == pytest.approx(parameters, rel=0.01)


def test_signs_are_balanced_on_new_images(network):
    name, model = network
    shape = [d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim][1:]
    images = np.random.default_rng(99).standard_normal((2, *shape)).astype(np.float32)
    output, signs = run_signs(model, images)
    assert np.isfinite(output).all() and output.shape[0] == 2
    assert not np.array_equal(output[0], output[1])
    assert len(signs) >= 6
    for layer, bits in signs.items():
        assert set(np.unique(bits)) <= {-1.0, 1.0}, (name, layer)
        assert 0.3 < np.mean(bits > 0) < 0.7, (name, layer, np.mean(bits > 0))
        # A channel that is the same everywhere would make its part of the layer a constant.
        dead = np.mean(bits.min(tuple(i for i in range(bits.ndim) if i != 1)) == bits.max(tuple(i for i in range(bits.ndim) if i != 1)))
        assert dead < (0.6 if bits.ndim == 2 or bits.shape[-1] == 1 else 0.1), (name, layer, dead)


def test_build_is_deterministic():
    assert zoo.build("quicknet_small").SerializeToString() == zoo.build("quicknet_small").SerializeToString()


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="quicknet_large"):
        zoo.build("resnet50")


def test_command_line_writes_a_model(tmp_path):
    path = tmp_path / "net.onnx"
    assert zoo.main(["quicknet_small", str(path)]) == 0
    onnx.checker.check_model(str(path))
    assert zoo.main([]) == 2
