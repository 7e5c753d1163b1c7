from __future__ import annotations

import contextlib
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
from edgetune_runtime import NotFoundError, VerificationError
from edgetune_runtime.formats.onnx_file import OnnxHeader, Value, read_onnx
from google.protobuf.message import DecodeError, Message
from onnx import ModelProto, TensorProto, helper, numpy_helper

MODULE = "layers.0.attn.q_proj"


def external(name: str, values: np.ndarray, file: str = "weights.data", **entries: object) -> TensorProto:
    """A tensor that says that its values lie in `file`; entries of None are left out."""
    tensor = TensorProto(name=name, data_type=helper.np_dtype_to_tensor_dtype(values.dtype), dims=values.shape)
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": file, "offset": 0, "length": values.nbytes, **entries}.items():
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def slot_parts() -> tuple[list[onnx.ValueInfoProto], list[TensorProto]]:
    """The inputs of a low-rank slot and their defaults."""
    names = [f"{MODULE}.lora_{part}.weight" for part in "AB"]
    shapes, empty = ((64, "rank"), ("rank", 32)), ((64, 0), (0, 32))
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in zip(names, shapes, strict=True)]
    defaults = [numpy_helper.from_array(np.zeros(s, np.float32), n) for n, s in zip(names, empty, strict=True)]
    return inputs, defaults


def make_model(
    initializers: list[TensorProto] | None = None,
    inputs: list[onnx.ValueInfoProto] | None = None,
    nodes: list[onnx.NodeProto] | None = None,
) -> ModelProto:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    nodes = nodes or [helper.make_node("Relu", ["x"], ["y"])]
    graph = helper.make_graph(nodes, "main", [x, *(inputs or ())], [y], initializers or [])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets)
    helper.set_model_props(model, {"edgetune.base_fingerprint": "abc"})
    return model


def rich_model() -> ModelProto:
    """Slots, a tensor in an attribute and every way of storing numbers."""
    inputs, defaults = slot_parts()
    constant = helper.make_node("Constant", [], ["c"], value=numpy_helper.from_array(np.ones((2, 2), np.float32)))
    fused = helper.make_node("MatMulNBits", ["x"], ["y"], domain="com.microsoft", K=64, N=32, name="fused")
    return make_model([*defaults, *stored()], inputs, [constant, fused])


def stored() -> list[TensorProto]:
    return [
        helper.make_tensor("floats", TensorProto.FLOAT, [3], [1.0, 2.0, 3.0]),
        helper.make_tensor("numbers", TensorProto.INT64, [2], [-1, 2**40]),
        helper.make_tensor("texts", TensorProto.STRING, [2], [b"", b"\xff"]),
        helper.make_tensor("nibbles", TensorProto.UINT4, [3], [1, 2, 3]),
        helper.make_tensor("scalar", TensorProto.FLOAT16, [], np.float16(2).tobytes(), raw=True),
        helper.make_tensor("packed", TensorProto.INT4, [3], b"\x12\x03", raw=True),
    ]


def saved(model: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def shape_of(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    dims = value.type.tensor_type.shape.dim
    return tuple(d.dim_value if d.HasField("dim_value") else d.dim_param for d in dims)


def assert_agrees(header: OnnxHeader, model: ModelProto) -> None:
    """`header` says what onnx's own reader says."""
    assert header.metadata == {entry.key: entry.value for entry in model.metadata_props}
    for found, expected in ((header.inputs, model.graph.input), (header.outputs, model.graph.output)):
        assert list(found.values()) == [Value(v.name, v.type.tensor_type.elem_type, shape_of(v)) for v in expected]
    initializers = [Value(t.name, t.data_type, tuple(t.dims)) for t in model.graph.initializer]
    assert list(header.initializers.values()) == initializers


@pytest.fixture(scope="module")
def exported(both_of: Callable[[str], Path]) -> Path:
    """The base of a bundle, as edgetune exports it."""
    return both_of("llama") / "base/onnx/model.onnx"


def test_a_header_matches_that_of_the_onnx_package_for_a_graph_with_every_field(tmp_path: Path) -> None:
    model = rich_model()
    header = read_onnx(saved(model, tmp_path))
    assert_agrees(header, model)
    assert header.inputs["x"] == Value("x", TensorProto.FLOAT, ("batch", "", 64))
    assert header.ops == {"Constant", "com.microsoft::MatMulNBits"}
    assert header.external_files == ()


def test_a_header_matches_that_of_the_onnx_package_for_an_exported_graph(exported: Path) -> None:
    model = onnx.load(exported, load_external_data=False)
    header = read_onnx(exported)
    assert_agrees(header, model)
    assert header.ops == {f"{n.domain}::{n.op_type}" if n.domain else n.op_type for n in model.graph.node}
    assert header.external_files == ("model.onnx.data",)


def test_an_exported_graph_is_read_without_numpy(exported: Path) -> None:
    code = f"import sys, pathlib, edgetune_runtime.formats.onnx_file as o; o.read_onnx(pathlib.Path({str(exported)!r}))"
    subprocess.run([sys.executable, "-c", code + "; assert 'numpy' not in sys.modules"], check=True)


def test_an_exported_graph_with_half_its_weights_is_damaged(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(exported.read_bytes())
    weights = exported.with_name("model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(VerificationError, match="past the end"):
        read_onnx(path)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        read_onnx(tmp_path / "none.onnx")


def test_a_folder_and_a_pipe_are_no_onnx_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(VerificationError, match="not a regular file"):
            read_onnx(path)


def is_read(data: bytes, path: Path) -> bool:
    """Whether the bytes are read as a header; any error but VerificationError fails the test."""
    path.write_bytes(data)
    try:
        read_onnx(path)
    except VerificationError:
        return False
    return True


def test_a_file_cut_off_anywhere_within_its_graph_is_damaged(tmp_path: Path) -> None:
    data = rich_model().SerializeToString()
    readable = [length for length in range(len(data)) if is_read(data[:length], tmp_path / "cut.onnx")]
    # Cut off between two fields behind the graph, a file is a whole model with less metadata.
    assert len(readable) <= 4
    assert all(length > 0.8 * len(data) for length in readable)


def test_flipped_bits_are_damage_or_what_onnx_reads(tmp_path: Path) -> None:
    data, rng, path = rich_model().SerializeToString(), random.Random(0), tmp_path / "flipped.onnx"
    agreed = 0
    for _ in range(1500):
        flipped = bytearray(data)
        for _ in range(rng.choice((1, 1, 1, 4))):
            flipped[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if is_read(bytes(flipped), path):
            # Numbers within weights are skipped here, and checked by protobuf alone.
            with contextlib.suppress(DecodeError):
                assert_agrees(read_onnx(path), ModelProto.FromString(bytes(flipped)))
                agreed += 1
    assert 300 < agreed < 1200


def test_random_bytes_are_damage(tmp_path: Path) -> None:
    rng = random.Random(0)
    assert not any(is_read(rng.randbytes(rng.randrange(200)), tmp_path / "random.onnx") for _ in range(500))


def field(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def varint(number: int) -> bytes:
    data = b""
    while number > 0x7F:
        data, number = data + bytes([number & 0x7F | 0x80]), number >> 7
    return data + bytes([number])


GRAPH, OPSET = field(7, field(2, b"main")), field(8, b"\x10\x15")
SOUND = b"\x08\x0a" + GRAPH + OPSET


def model_of(graph: bytes) -> bytes:
    return b"\x08\x0a" + OPSET + field(7, graph)


def input_of(kind: bytes) -> bytes:
    return model_of(field(11, field(2, kind)))


@pytest.mark.parametrize(
    "data",
    [
        GRAPH + OPSET,
        b"\x08\x0a" + OPSET,
        b"\x08\x0a" + GRAPH,
        SOUND + GRAPH,
        SOUND + b"\x08\x0a",
        SOUND + OPSET,
        SOUND + b"\x3a\x7f",
        SOUND + b"\x38\x01",
        SOUND + b"\x00\x00",
        SOUND + b"\x9b\x06",
        SOUND + b"\x9f\x06",
        SOUND + b"\x9d\x06\x00",
        SOUND + b"\x98\x06" + b"\xff" * 9 + b"\x02",
        SOUND + b"\x98\x06" + b"\x80" * 10 + b"\x01",
        SOUND + varint(1 << 35 | 2) + b"\x00",
        SOUND + field(14, field(1, b"\xff")),
        SOUND + 2 * field(14, field(1, b"k")),
        model_of(field(1, b"")),
        input_of(field(1, b"\x08\xff\xff\xff\xff\x7f")),
        input_of(field(1, field(2, field(1, b"\x08\x01\x12\x01n")))),
    ],
)
def test_a_model_that_cannot_be_is_damaged(data: bytes, tmp_path: Path) -> None:
    assert not is_read(data, tmp_path / "bad.onnx")


@pytest.mark.parametrize(
    "data",
    [
        SOUND,
        SOUND + b"\x9d\x06" + bytes(4),
        SOUND + field(99, b"new"),
        model_of(field(1, field(4, b"Relu"))),
        input_of(field(1, b"\x08\x01" + field(2, field(1, b"\x08\x01")))),
    ],
)
def test_the_same_models_without_fault_are_read(data: bytes, tmp_path: Path) -> None:
    assert is_read(data, tmp_path / "good.onnx")


def of_attribute(part: bytes) -> bytes:
    return model_of(field(1, field(4, b"If") + field(5, part)))


def model_of_node(path: Path, node: onnx.NodeProto) -> Path:
    """A model of one node at `path`."""
    value = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([node], "g", [], [value])), path)
    return path


@pytest.mark.parametrize(("inputs", "is_fine"), [(9, True), (10, False)])
def test_attention_has_no_inputs_but_those_that_exporters_write(inputs: int, is_fine: bool, tmp_path: Path) -> None:
    names = [*map(str, range(inputs)), "", ""]
    node = onnx.helper.make_node("GroupQueryAttention", names, ["y"], domain="com.microsoft")
    path = model_of_node(tmp_path / "model.onnx", node)
    with contextlib.nullcontext() if is_fine else pytest.raises(VerificationError, match="inputs that no exporter"):
        read_onnx(path)


@pytest.mark.parametrize(("outputs", "is_fine"), [(2, True), (1, False)])
def test_a_split_has_as_many_outputs_as_it_says(outputs: int, is_fine: bool, tmp_path: Path) -> None:
    node = onnx.helper.make_node("Split", ["x"], ["y", "z"], num_outputs=outputs)
    path = model_of_node(tmp_path / "model.onnx", node)
    with contextlib.nullcontext() if is_fine else pytest.raises(VerificationError, match="than its num_outputs"):
        read_onnx(path)


@pytest.mark.parametrize(
    ("message", "model_with", "names"),
    [
        (ModelProto, SOUND.__add__, ("training_info", "functions")),
        (onnx.GraphProto, model_of, ("sparse_initializer",)),
        (onnx.AttributeProto, of_attribute, ("g", "graphs", "tensors", "sparse_tensor", "sparse_tensors")),
        (onnx.TypeProto, input_of, ("sequence_type", "map_type", "sparse_tensor_type", "optional_type")),
    ],
)
def test_parts_that_no_exporter_writes_are_refused_by_name(
    message: type[Message], model_with: Callable[[bytes], bytes], names: Sequence[str], tmp_path: Path
) -> None:
    path = tmp_path / "model.onnx"
    for name in names:
        path.write_bytes(model_with(field(message.DESCRIPTOR.fields_by_name[name].number, b"")))
        with pytest.raises(VerificationError, match=rf"\.onnx has {name}, which no exporter writes"):
            read_onnx(path)


def test_a_hostile_number_of_fields_is_refused_soon(tmp_path: Path) -> None:
    path = tmp_path / "long.onnx"
    path.write_bytes(SOUND + field(7, field(5, field(1, bytes(3_000_000)))))
    with pytest.raises(VerificationError, match="more than"):
        read_onnx(path)


VALUES = np.arange(16, dtype=np.float32)


def in_initializer(tensor: TensorProto) -> ModelProto:
    return make_model([tensor])


def in_attribute(tensor: TensorProto) -> ModelProto:
    return make_model(nodes=[helper.make_node("Constant", [], ["y"], value=tensor)])


@pytest.mark.parametrize("place", [in_initializer, in_attribute])
def test_external_data_is_found_and_checked_wherever_a_tensor_can_be(
    place: Callable[[TensorProto], ModelProto], tmp_path: Path
) -> None:
    path = saved(place(external("w", VALUES)), tmp_path)
    with pytest.raises(VerificationError, match="missing"):
        read_onnx(path)
    (tmp_path / "weights.data").write_bytes(VALUES.tobytes())
    assert read_onnx(path).external_files == ("weights.data",)
    (tmp_path / "weights.data").write_bytes(VALUES.tobytes()[:-1])
    with pytest.raises(VerificationError, match="past the end"):
        read_onnx(path)


@pytest.fixture
def folders(tmp_path: Path) -> Iterator[Path]:
    """A model's folder with weights in and beside it, and links to both."""
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (folder / "*" / "_ORT_MEM_ADDR_").mkdir(parents=True)
    names = ("model/in.data", "model/sub/in.data", "model/c:in.data", "model/back\\slash", "out.data")
    for name in (*names, "model/*/_ORT_MEM_ADDR_/*"):
        (tmp_path / name).write_bytes(VALUES.tobytes())
    (folder / "inward").symlink_to("in.data")
    (folder / "outward").symlink_to("../out.data")
    (folder / "up").symlink_to("..")
    (folder / "circle").symlink_to("circle")
    os.mkfifo(folder / "pipe")
    yield folder


@pytest.mark.parametrize("location", ["in.data", "sub/in.data", "inward", "./in.data"])
def test_external_data_in_the_models_folder_is_read(location: str, folders: Path) -> None:
    header = read_onnx(saved(make_model([external("w", VALUES, location)]), folders))
    assert header.external_files == (location.removeprefix("./"),)


@pytest.mark.parametrize(
    "location",
    [
        "",
        ".",
        "sub",
        "pipe",
        "none",
        "circle",
        "../out.data",
        "sub/../in.data",
        "outward",
        "up/out.data",
        "/etc/hostname",
        "c:in.data",
        "back\\slash",
        "in.data\0",
        "*/_ORT_MEM_ADDR_/*",
        "x" * 5000,
    ],
)
def test_external_data_elsewhere_is_refused(location: str, folders: Path) -> None:
    with pytest.raises(VerificationError):
        read_onnx(saved(make_model([external("w", VALUES, location)]), folders))


def test_an_absolute_path_into_the_models_folder_is_refused(folders: Path) -> None:
    tensor = external("w", VALUES, str(folders / "in.data"))
    with pytest.raises(VerificationError, match="plain path"):
        read_onnx(saved(make_model([tensor]), folders))


@pytest.mark.parametrize(
    "entries",
    [
        {"offset": 1},
        {"offset": -1},
        {"offset": "0x0"},
        {"offset": "\u0661"},
        {"offset": "9" * 5000},
        {"length": 60},
        {"length": 68},
        {"length": -64},
        {"location": None},
        {"basepath": "/etc"},
        {"prepacked_w": "0;64;0"},
    ],
)
def test_external_data_at_an_impossible_place_is_refused(entries: dict[str, object], folders: Path) -> None:
    with pytest.raises(VerificationError):
        read_onnx(saved(make_model([external("w", VALUES, "in.data", **entries)]), folders))


def test_without_a_length_the_shape_says_how_much_is_read(folders: Path) -> None:
    read_onnx(saved(make_model([external("w", VALUES, "in.data", length=None)]), folders))
    with pytest.raises(VerificationError, match="past the end"):
        read_onnx(saved(make_model([external("w", np.zeros(17, np.float32), "in.data", length=None)]), folders))


def test_a_second_location_of_one_tensor_is_refused(folders: Path) -> None:
    tensor = external("w", VALUES, "in.data")
    tensor.external_data.add(key="location", value="sub/in.data")
    with pytest.raises(VerificationError, match="twice"):
        read_onnx(saved(make_model([tensor]), folders))


def test_a_tensor_without_elements_needs_no_bytes(folders: Path) -> None:
    empty = np.zeros((64, 0), np.float32)
    outside = external("a", empty, "in.data", offset=VALUES.nbytes)
    inside = TensorProto(name="b", data_type=TensorProto.FLOAT, dims=[0, 32])
    assert read_onnx(saved(make_model([outside, inside]), folders)).initializers["b"].shape == (0, 32)


def changed(**fields: object) -> TensorProto:
    tensor = numpy_helper.from_array(VALUES, "w")
    for name, value in fields.items():
        if name == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        elif value is None:
            tensor.ClearField(name)
        else:
            setattr(tensor, name, value)
    return tensor


@pytest.mark.parametrize(
    "tensor",
    [
        changed(dims=[15]),
        changed(dims=[2**62, 2**62]),
        changed(dims=[-16]),
        changed(dims=[-4, -4]),
        changed(dims=[1] * 100),
        changed(raw_data=VALUES.tobytes()[1:]),
        changed(raw_data=None),
        changed(data_type=TensorProto.STRING),
        changed(data_type=99),
        changed(data_location=TensorProto.EXTERNAL),
    ],
)
def test_a_tensor_that_contradicts_itself_is_refused(tensor: TensorProto, tmp_path: Path) -> None:
    with pytest.raises(VerificationError):
        read_onnx(saved(make_model([tensor]), tmp_path))


def test_a_name_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    inputs, defaults = slot_parts()
    for model in (make_model(defaults * 2), make_model([], inputs * 2)):
        with pytest.raises(VerificationError, match="twice"):
            read_onnx(saved(model, tmp_path))
