// Load a folder with transformers.js and print what it answers. Nothing is fetched: models are local files alone.
//
// Reads one JSON document from standard input: `root` and `model` (the folder is root/model), `task` (of `pipeline`),
// `inputs` (arrays of arrays of numbers; whole numbers of the names that hold them become int64), `generate` (arguments
// of `generate`, or null: one forward pass). Prints one JSON document: output name -> {dims, data}.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const request = JSON.parse(readFileSync(0, "utf8"));
// The package lies in the folder of its environment, not beside this file.
const require = createRequire(`${request.environment}/package.json`);
const library = await import(pathToFileURL(require.resolve("@huggingface/transformers")).href);
const { env, Tensor } = library;
env.allowRemoteModels = false;
env.allowLocalModels = true;
env.localModelPath = request.root;

const tensor = ({ dtype, dims, data }) =>
  new Tensor(dtype, dtype === "int64" ? BigInt64Array.from(data, BigInt) : Float32Array.from(data), dims);
const plain = (value) => ({ dims: value.dims, data: Array.from(value.data, Number) });

let answer;
if (request.pipeline) {
  const pipe = await library.pipeline(request.pipeline, request.model, { dtype: "fp32", ...request.options });
  const result = await pipe(request.text, request.arguments);
  answer = result instanceof Tensor ? { features: plain(result) } : result;
} else {
  const model = await library[request.loader].from_pretrained(request.model, { dtype: "fp32", ...request.options });
  const inputs = Object.fromEntries(Object.entries(request.inputs).map(([name, value]) => [name, tensor(value)]));
  if (request.generate) {
    answer = { sequences: plain(await model.generate({ ...inputs, ...request.generate })) };
  } else {
    const outputs = await model(inputs);
    const tensors = Object.entries(outputs).filter(([, value]) => value instanceof Tensor);
    answer = Object.fromEntries(tensors.map(([name, value]) => [name, plain(value)]));
  }
}
process.stdout.write(JSON.stringify(answer));
