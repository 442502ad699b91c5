"""Every bad model gives an error of the BnnError tree that says what, where and why."""

import os

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bnntvm.errors import BnnError, ModelError, UnsupportedError
from bnntvm.importer import import_model

from .helpers import model, one

X = np.ones((2, 3), np.float32)


def node(op_type, inputs, outputs, **attributes):
    return helper.make_node(op_type, inputs.split(), outputs.split(), **attributes)


def matmul(weight=None):
    weight = np.ones((3, 4), np.float32) if weight is None else weight
    return model([node("MatMul", "x w", "y", name="product")], {"x": X}, ["y"], {"w": weight})


@pytest.mark.parametrize("source", [b"", b"hello, world", b"\x08\x07\x12", b"PK\x03\x04" + bytes(100)])
def test_not_onnx(source, tmp_path):
    with pytest.raises(ModelError):
        import_model(source)
    path = tmp_path / "m.onnx"
    path.write_bytes(source)
    with pytest.raises(ModelError, match="m.onnx"):
        import_model(path)


def test_truncated_anywhere():
    data = matmul().SerializeToString()
    for length in range(0, len(data), 3):
        with pytest.raises(BnnError):
            import_model(data[:length])


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        import_model(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="cannot be read"):
        import_model(str(tmp_path))
    with pytest.raises(ModelError, match="got int"):
        import_model(7)


def test_sources_of_every_kind(tmp_path):
    proto = matmul()
    path = tmp_path / "model.onnx"
    onnx.save(proto, path)
    before = proto.SerializeToString()
    for source in (proto, proto.SerializeToString(), path, str(path), os.fsencode(path).decode()):
        assert import_model(source).layers[0].output == "y"
    assert proto.SerializeToString() == before


def test_random_damage():
    """Whatever bytes change, an import succeeds or raises a BnnError."""
    rng, data = np.random.default_rng(5), matmul().SerializeToString()
    for _ in range(400):
        damaged = bytearray(data)
        for place in rng.integers(0, len(data), rng.integers(1, 4)):
            damaged[place] = rng.integers(256)
        try:
            import_model(bytes(damaged))
        except BnnError:
            pass


def test_element_type_that_does_not_exist():
    proto = matmul()
    proto.graph.output[0].type.tensor_type.elem_type = 100
    with pytest.raises(ModelError, match="(?s)'y'.*100"):
        import_model(proto)


def test_no_graph():
    with pytest.raises(ModelError, match="no graph"):
        import_model(onnx.ModelProto(ir_version=8))


def test_dangling_input():
    proto = matmul()
    proto.graph.node[0].input[0] = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        import_model(proto)


def test_dangling_output():
    proto = matmul()
    proto.graph.output[0].name = "nowhere"
    with pytest.raises(ModelError, match="nowhere"):
        import_model(proto)


def test_duplicate_names():
    proto = model([node("Relu", "x", "y"), node("Neg", "x", "y")], {"x": X}, ["y"])
    with pytest.raises(ModelError, match="not valid"):
        import_model(proto)
    proto = matmul()
    proto.graph.input.append(proto.graph.input[0])
    with pytest.raises(ModelError, match="same name"):
        import_model(proto)


def test_wrong_types_and_shapes():
    with pytest.raises(BnnError, match="product"):
        import_model(matmul(np.ones((4, 4), np.float32)))
    proto = model([node("Add", "x c", "y", name="sum")], {"x": X}, ["y"], {"c": np.ones(5, np.float32)})
    with pytest.raises(BnnError, match="sum"):
        import_model(proto)


@pytest.mark.parametrize("opset", [6, onnx.defs.onnx_opset_version() + 1])
def test_opsets_out_of_range(opset):
    proto = matmul()
    proto.opset_import[0].version = opset
    with pytest.raises(UnsupportedError, match=f"opset {opset}"):
        import_model(proto)


@pytest.mark.parametrize("value, kind", [(np.nan, "NaN"), (np.inf, "infinity")])
def test_weights_that_are_not_finite(value, kind):
    weight = np.ones((3, 4), np.float32)
    weight[1, 2] = value
    with pytest.raises(ModelError, match=f"(?s){kind}.*'w'"):
        import_model(matmul(weight))


def test_infinity_outside_of_weights_is_legal():
    import_model(one("Add", {"x": X}, {"mask": np.array([0, -np.inf, 0], np.float32)}))


def test_unknown_operators_name_what_there_is():
    proto = model([helper.make_node("Magic", ["x"], ["y"], name="trick", domain="some.domain")], {"x": X}, ["y"], domains=["some.domain"])
    with pytest.raises(UnsupportedError) as caught:
        import_model(proto)
    message = str(caught.value)
    for part in ("Magic", "some.domain", "trick", "Conv", "entry point"):
        assert part in message
    assert max(map(len, message.splitlines())) < 160


def test_control_flow():
    branch = helper.make_graph(
        [node("Identity", "x", "inner")], "branch", [], [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)]
    )
    branch.output[0].type.CopyFrom(helper.make_tensor_value_info("inner", TensorProto.FLOAT, [2, 3]).type)
    if_node = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    with pytest.raises(UnsupportedError, match="(?s)If.*choice.*control flow"):
        import_model(model([if_node], {"x": X}, ["y"], {"c": np.array(True)}))


def test_strings_and_sequences():
    text = helper.make_tensor_value_info("x", TensorProto.STRING, [2])
    out = helper.make_tensor_value_info("y", TensorProto.STRING, [2])
    proto = helper.make_model(
        helper.make_graph([node("Identity", "x", "y")], "g", [text], [out]), opset_imports=[helper.make_opsetid("", 17)]
    )
    proto.ir_version = 10
    with pytest.raises(UnsupportedError, match="string"):
        import_model(proto)
    with pytest.raises(UnsupportedError, match="SequenceConstruct"):
        import_model(model([node("SequenceConstruct", "x", "s"), node("SequenceLength", "s", "y")], {"x": X}, ["y"]))


def test_empty_tensors():
    with pytest.raises(UnsupportedError, match="no elements"):
        import_model(model([node("Relu", "x", "y")], {"x": ((2, 0), "float32")}, ["y"]))
    proto = model([node("Slice", "x s e a", "z", name="cut"), node("Relu", "z", "y")], {"x": X}, ["y"], {k: np.array([1]) for k in "sea"})
    with pytest.raises(UnsupportedError, match="(?s)no elements.*cut"):
        import_model(proto)


def test_unused_unsupported_outputs_are_no_error():
    x = np.ones((1, 1, 4, 4), np.float32)
    import_model(one("Dropout", {"x": x}, outputs=1))
    nodes = [node("MaxPool", "x", "y where", kernel_shape=[2, 2])]
    import_model(model(nodes, {"x": x}, ["y"]))
    with pytest.raises(UnsupportedError, match="'where'"):
        import_model(model(nodes, {"x": x}, ["y", "where"]))


# ---- external data


def external(tmp_path, location="weights.bin", write=True):
    """A saved model whose weight is external data at ``location``."""
    folder = tmp_path / "model"
    folder.mkdir()
    proto = matmul()
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensor = proto.graph.initializer[0]
    tensor.CopyFrom(numpy_helper.from_array(array, "w"))
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    path = folder / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    if write:
        (folder / "weights.bin").write_bytes(array.tobytes())
    return path


def test_external_data(tmp_path):
    imported = import_model(external(tmp_path))
    assert imported.layers[0].weight_shape == (3, 4)


def test_missing_external_data(tmp_path):
    with pytest.raises(ModelError, match="(?s)missing.*'w'.*weights.bin"):
        import_model(external(tmp_path, write=False))


def test_external_data_too_short(tmp_path):
    path = external(tmp_path)
    (path.parent / "weights.bin").write_bytes(b"1234")
    with pytest.raises(ModelError):
        import_model(path)


def test_external_data_of_bytes(tmp_path):
    with pytest.raises(ModelError, match="give the path"):
        import_model(external(tmp_path).read_bytes())


@pytest.mark.parametrize("location", ["../secret.bin", "sub/../../secret.bin", "{absolute}", "link.bin"])
def test_external_data_outside_of_the_folder(tmp_path, location):
    secret = tmp_path / "secret.bin"
    secret.write_bytes(bytes(48))
    path = external(tmp_path, location.format(absolute=secret))
    (path.parent / "sub").mkdir()
    (path.parent / "link.bin").symlink_to(secret)
    with pytest.raises(ModelError, match="(?s)outside.*'w'"):
        import_model(path)


def convolution(image=(2, 3, 5, 5), kernel=(4, 3, 3, 3), **attributes):
    product = node("Conv", "x w", "y", name="product", **attributes)
    return model([product], {"x": np.ones(image, np.float32)}, ["y"], {"w": np.ones(kernel, np.float32)})


@pytest.mark.parametrize(
    "proto, match",
    [
        (convolution(kernel=(4, 3, 7, 7)), "(?s)larger than the image.*product.*reaches over 7, the padded image has 5"),
        (convolution(dilations=[1, 3]), "larger than the image"),
        (convolution(strides=[0, 1]), "strides must be positive"),
        (convolution(dilations=[1, 0]), "dilations must be positive"),
    ],
)
def test_windows_that_are_none(proto, match):
    with pytest.raises(ModelError, match=match):
        import_model(proto)


def test_a_window_that_just_fits():
    assert import_model(convolution(kernel=(4, 3, 7, 7), pads=[1, 1, 1, 1])).outputs[0].shape == (2, 4, 1, 1)


def test_negative_variance():
    variance = np.float32([1, -1, 1])
    parameters = {"g": np.ones(3, np.float32), "b": np.ones(3, np.float32), "m": np.ones(3, np.float32), "v": variance}
    proto = model([node("BatchNormalization", "x g b m v", "y", name="norm")], {"x": np.ones((1, 3, 2, 2), np.float32)}, ["y"], parameters)
    with pytest.raises(ModelError, match="(?s)variance is negative.*norm.*'v' holds -1"):
        import_model(proto)


def test_output_without_a_shape():
    proto = matmul()
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    with pytest.raises(ModelError, match="(?s)'y'.*infer_shapes"):
        import_model(proto)


def test_newer_ir_version():
    proto = matmul()
    proto.ir_version = 99
    with pytest.raises(UnsupportedError, match="(?s)IR version 99.*update onnx"):
        import_model(proto)


def test_constant_without_elements():
    proto = model([node("Concat", "x e", "y", axis=0, name="join")], {"x": X}, ["y"], {"e": np.ones((0, 3), np.float32)})
    with pytest.raises(UnsupportedError, match="(?s)no elements.*join"):
        import_model(proto)


def test_paths_that_no_file_can_have(tmp_path):
    with pytest.raises(ModelError, match="cannot be read"):
        import_model("zero\0byte")
    for location in ("zero\0byte", "x" * 5000):
        proto = matmul()
        onnx.external_data_helper.set_external_data(proto.graph.initializer[0], location)
        proto.graph.initializer[0].ClearField("raw_data")
        path = tmp_path / "m.onnx"
        path.write_bytes(proto.SerializeToString())
        with pytest.raises(ModelError, match="(?s)external data cannot be read.*'w'"):
            import_model(path)


def test_link_out_of_the_folder_is_named(tmp_path):
    proto = matmul()
    onnx.external_data_helper.set_external_data(proto.graph.initializer[0], "link")
    proto.graph.initializer[0].ClearField("raw_data")
    (tmp_path / "inside").mkdir()
    (tmp_path / "outside").write_bytes(bytes(48))
    (tmp_path / "inside" / "link").symlink_to(tmp_path / "outside")
    path = tmp_path / "inside" / "m.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="(?s)outside.*a link to"):
        import_model(path)


def test_dynamic_dimensions_of_several_inputs_are_one_batch():
    proto = model([node("Add", "a b", "y")], {"a": X, "b": X}, ["y"], {})
    for name, value in zip("NM", proto.graph.input):
        value.type.tensor_type.shape.dim[0].dim_param = name
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_param = "N"
    assert [info.shape for info in import_model(proto).inputs] == [("N", 3), ("N", 3)]


@pytest.mark.parametrize(
    "nodes, shape, weight",
    [
        ([node("Conv", "x w", "y")], [1, 5, 8, 8], (8, 4, 3, 3)),
        ([node("Conv", "x w", "y", group=3)], [1, 12, 8, 8], (8, 4, 3, 3)),
        ([node("ConvTranspose", "x w", "y", group=3)], [1, 12, 8, 8], (10, 4, 3, 3)),
        ([node("Gemm", "x w", "y")], [1, 5], (4, 8)),
        ([node("MatMul", "x w", "y")], [1, 5], (4, 8)),
        ([node("Add", "x w", "y")], [1, 5], (4, 8)),
        ([node("Concat", "x w", "y", axis=1)], [1, 5, 2], (1, 5, 3)),
        ([node("Softmax", "x", "y", axis=9)], [1, 5, 2], (1,)),
    ],
)
def test_shapes_that_do_not_fit(nodes, shape, weight):
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", 1, shape)],
        [helper.make_tensor_value_info("y", 1, ["a"] * len(shape))],
        [numpy_helper.from_array(np.ones(weight, np.float32), "w")],
    )  # fmt: skip
    with pytest.raises(ModelError, match="fit together"):
        import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_a_declared_output_shape_that_is_wrong_is_overruled():
    graph = helper.make_graph(
        [node("Relu", "x", "y")], "g", [helper.make_tensor_value_info("x", 1, [1, 5])],
        [helper.make_tensor_value_info("y", 1, [1, 7])],
    )  # fmt: skip
    imported = import_model(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert tuple(imported.outputs[0].shape) == (1, 5)
