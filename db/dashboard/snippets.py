"""How a converted model is loaded, in the ways that people load it; text to copy, whole, and run by the tests alone."""

from __future__ import annotations

import ast
import json
import operator
from collections.abc import Mapping
from pathlib import PurePath

from db.records import ArtifactRecord, ConversionRecord, TensorRecord

__all__ = ["snippets"]

# What stands for an axis of an input made up for a first run, where no check tells a size that was tried.
_SMALL = 2
_SENTENCE = "The ferry leaves the harbour at seven."
_GENERATES = {"text-generation", "text2text-generation", "summarization", "translation"}
_TEXTS = _GENERATES | {"text-classification", "token-classification", "feature-extraction", "fill-mask"}
_IMAGES = {"image-classification", "image-feature-extraction", "object-detection", "image-segmentation"}
_CPP_TYPES = {
    "float32": "float", "float64": "double", "float16": "Ort::Float16_t", "bfloat16": "Ort::BFloat16_t", "bool": "bool",
    "int8": "std::int8_t", "int16": "std::int16_t", "int32": "std::int32_t", "int64": "std::int64_t",
    "uint8": "std::uint8_t", "uint16": "std::uint16_t", "uint32": "std::uint32_t", "uint64": "std::uint64_t",
}  # fmt: skip
_CPP_ONES = """\
template <typename T>
Ort::Value ones(const std::vector<std::int64_t>& shape) {
  Ort::AllocatorWithDefaultOptions allocator;
  auto value = Ort::Value::CreateTensor<T>(allocator, shape.data(), shape.size());
  std::fill_n(value.template GetTensorMutableData<T>(), value.GetTensorTypeAndShapeInfo().GetElementCount(), T(1));
  return value;
}
"""
_OPERATORS = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
}  # fmt: skip


def snippets(record: ConversionRecord) -> list[tuple[str, str]]:
    """Return title and code for each way to load the artifact; empty where there is none, or only one in quarantine.

    Of an artifact in a store elsewhere, which other programs cannot read where it lies, there is one way: ours.
    """
    artifact = record.artifact
    if artifact is None or artifact.quarantined or not artifact.graphs:
        return []
    elsewhere = "://" in artifact.path
    # JSON's string is Python's and JavaScript's too, whatever the model's name has in it.
    found = [("onnx-ferry", _ferry(record, artifact, json.dumps(record.model_id if elsewhere else artifact.path)))]
    if elsewhere:
        return found
    found.append(("ONNX Runtime", _runtime(record, artifact)))
    if (program := _cpp(record, artifact)) is not None:
        found.append(("C++", program))
    names = {file.path for file in artifact.files}
    if (record.task in _TEXTS and "tokenizer.json" in names) or (
        record.task in _IMAGES and "preprocessor_config.json" in names
    ):
        found.append(("transformers.js", _javascript(record, artifact)))
    return found


def _ferry(record: ConversionRecord, artifact: ArtifactRecord, name: str) -> str:
    load = f"from onnx_config import AutoModelForONNX\n\nmodel = AutoModelForONNX.from_pretrained({name})\n"
    if record.task not in _TEXTS or not any(file.path.startswith("tokenizer") for file in artifact.files):
        given = f"inputs = {{\n{_feed(record, artifact)}\n}}"
        return f"import numpy as np\n\n{load}{given}\noutputs = model(**inputs)\nprint(outputs)"
    call = "model(**inputs)\nprint(outputs)"
    if record.task in _GENERATES:
        call = "model.generate(**inputs, max_new_tokens=20)\nprint(tokenizer.batch_decode(outputs))"
    return (
        f"from transformers import AutoTokenizer\n\n{load}tokenizer = AutoTokenizer.from_pretrained({name})\n"
        f'inputs = tokenizer({json.dumps(_SENTENCE)}, return_tensors="pt")\noutputs = {call}'
    )


def _runtime(record: ConversionRecord, artifact: ArtifactRecord) -> str:
    file = json.dumps(str(PurePath(artifact.path) / artifact.graphs[0].path))
    return (
        "import numpy as np\nimport onnxruntime\n\n"
        f'session = onnxruntime.InferenceSession({file}, providers=["CPUExecutionProvider"])\n'
        f"outputs = session.run(None, {{\n{_feed(record, artifact)}\n}})\n"
        "for output, value in zip(session.get_outputs(), outputs):\n    print(output.name, value.shape)"
    )


def _javascript(record: ConversionRecord, artifact: ArtifactRecord) -> str:
    folder = PurePath(artifact.path)
    image = record.task in _IMAGES
    names = "env, pipeline, RawImage" if image else "env, pipeline"
    given = "new RawImage(new Uint8ClampedArray(64 * 64 * 3).fill(128), 64, 64, 3)" if image else json.dumps(_SENTENCE)
    if record.task in _GENERATES:
        given += ", { max_new_tokens: 20 }"
    return (
        f'import {{ {names} }} from "@huggingface/transformers";\n\n'
        "env.allowRemoteModels = false;\n"
        f"env.localModelPath = {json.dumps(str(folder.parent))};\n"
        f"const run = await pipeline({json.dumps(record.task)}, {json.dumps(folder.name)}, {{\n"
        '  dtype: "fp32",\n  subfolder: "",\n});\n'
        f"console.log(await run({given}));"
    )


def _cpp(record: ConversionRecord, artifact: ArtifactRecord) -> str | None:
    """Return a program over ONNX Runtime's C++ header; ``None`` where an input is of a type that C++ has not."""
    graph = artifact.graphs[0]
    if any(tensor.dtype not in _CPP_TYPES for tensor in graph.inputs):
        return None
    sizes = _verified_sizes(record, artifact)
    path = _cpp_text(str(PurePath(artifact.path) / graph.path))
    made = "".join(
        f"  values.push_back(ones<{_CPP_TYPES[tensor.dtype]}>({{{', '.join(map(str, _shape(tensor, sizes)))}}}));\n"
        for tensor in graph.inputs
    )
    return (
        "// c++ -std=c++17 model.cpp -lonnxruntime\n"
        "#include <onnxruntime_cxx_api.h>\n\n"
        "#include <algorithm>\n#include <cstdint>\n#include <iostream>\n#include <vector>\n\n"
        f"{_CPP_ONES}\n"
        "int main() {\n"
        "  Ort::Env env;\n"
        f"  Ort::Session session(env, ORT_TSTR({path}), Ort::SessionOptions{{}});\n"
        "  std::vector<Ort::Value> values;\n"
        f"{made}"
        f"  std::vector<const char*> inputs{{{', '.join(_cpp_text(tensor.name) for tensor in graph.inputs)}}};\n"
        f"  std::vector<const char*> outputs{{{', '.join(_cpp_text(tensor.name) for tensor in graph.outputs)}}};\n"
        "  auto found = session.Run(Ort::RunOptions{nullptr}, inputs.data(), values.data(), values.size(),\n"
        "                           outputs.data(), outputs.size());\n"
        "  for (std::size_t at = 0; at < found.size(); ++at) {\n"
        "    std::cout << outputs[at];\n"
        "    for (auto size : found[at].GetTensorTypeAndShapeInfo().GetShape()) std::cout << ' ' << size;\n"
        "    std::cout << '\\n';\n"
        "  }\n"
        "}"
    )


def _cpp_text(text: str) -> str:
    r"""Return a text as C++ has it: in bytes of UTF-8, since its escapes take neither control characters nor halves.

    >>> print(_cpp_text('a"b\\é'))
    "a\042b\134\303\251"
    """
    plain = "".join(
        chr(byte) if 32 <= byte < 127 and chr(byte) not in '"\\?' else f"\\{byte:03o}"
        for byte in text.encode("utf-8", "surrogateescape")
    )
    return f'"{plain}"'


def _feed(record: ConversionRecord, artifact: ArtifactRecord) -> str:
    sizes = _verified_sizes(record, artifact)
    return "\n".join(
        f"    {json.dumps(tensor.name)}: np.ones({_shape(tensor, sizes)}, dtype={json.dumps(tensor.dtype)}),"
        for tensor in artifact.graphs[0].inputs
    )


def _verified_sizes(record: ConversionRecord, artifact: ArtifactRecord) -> Mapping[str, int]:
    """Return sizes at which the first graph was verified: not every graph takes two of everything."""
    role = artifact.graphs[0].role
    cells = [cell for check in record.parity for cell in check.cells]
    return next((cell.sizes for cell in cells if cell.graph == role and cell.verdict == "verified"), {})


def _shape(tensor: TensorRecord, sizes: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(size if isinstance(size, int) else _size(size, sizes) for size in tensor.shape)


def _size(formula: str, sizes: Mapping[str, int]) -> int:
    """Return what a formula over axes comes to.

    >>> _size("past + sequence", {"past": 4, "sequence": 3}), _size("unknown", {})
    (7, 2)
    """
    try:
        return _value(ast.parse(formula, mode="eval").body, sizes)
    except (SyntaxError, ValueError, RecursionError, ArithmeticError):
        return _SMALL


def _value(node: ast.expr, sizes: Mapping[str, int]) -> int:
    match node:
        case ast.Name(id=name):
            return sizes.get(name, _SMALL)
        case ast.Constant(value=int(number)):
            return number
        case ast.BinOp(left=left, op=kind, right=right) if type(kind) in _OPERATORS:
            return int(_OPERATORS[type(kind)](_value(left, sizes), _value(right, sizes)))
        case _:
            raise ValueError("no formula of sizes")
