// transformers.js: see this folder's __init__.py. Run where `npm install @huggingface/transformers` was run.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";

const request = JSON.parse(readFileSync(process.argv[2], "utf-8"));
const require = createRequire(path.join(process.cwd(), "package.json"));
const entry = require.resolve("@huggingface/transformers");
const { AutoModelForCausalLM, AutoTokenizer, env } = await import(pathToFileURL(entry));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(request.folder);
const name = path.basename(request.folder);
const tokenizer = await AutoTokenizer.from_pretrained(name);
const model = await AutoModelForCausalLM.from_pretrained(name);

async function write(prompts, count) {
  const inputs = await tokenizer(prompts, { padding: true });
  const out = await model.generate({ ...inputs, max_new_tokens: count, min_new_tokens: count, do_sample: false });
  return out.tolist().map((row) => row.slice(inputs.input_ids.dims[1]).map(Number));
}

const { prompts, new_tokens } = request;
const start = performance.now();
const alone = [];
for (const prompt of prompts) alone.push((await write([prompt], new_tokens))[0]);
const seconds = (performance.now() - start) / 1000 / (new_tokens * prompts.length);
console.log(JSON.stringify({
  version: `transformers.js ${env.version}`,
  prompt_ids: await Promise.all(prompts.map(async (prompt) => (await tokenizer(prompt)).input_ids.tolist()[0].map(Number))),
  alone,
  batch: await write(prompts, new_tokens),
  beams_alone: null,
  beams_batch: null,
  seconds,
}));
