// node web_probe.mjs REQUEST.json > ANSWER.json; run by tests/runtime/test_web.py. Each job answers with its result or its error.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const request = JSON.parse(readFileSync(process.argv[2], 'utf-8'))
const found = name => import(pathToFileURL(createRequire(`${request.web}/package.json`).resolve(name)))
const ort = await found(request.engine), tokenizers = await found('@huggingface/tokenizers')
const Tokenizer = tokenizers.Tokenizer ?? tokenizers.default.Tokenizer // resolve() finds its CommonJS form
const { load } = await import(pathToFileURL(`${request.web}/dmpt.mjs`))
const { Sampler, pcg64 } = await import(pathToFileURL(`${request.web}/text.mjs`))
if (request.engine === 'onnxruntime-web') ort.env.wasm.numThreads = 1
const models = {}

async function open(folder) {
  const read = request.engine === 'onnxruntime-web' ? async name => new Uint8Array(readFileSync(`${folder}/${name}`)) : undefined
  return models[folder] ??= await load({ ort, Tokenizer, folder, read })
}

const JOBS = {
  async feed({ folder, plan }) { // plan: [[ids, last], ...]; a number rewinds
    const sequence = (await open(folder)).sequence(), out = []
    for (const step of plan) {
      if (typeof step === 'number') { sequence.rewind(step); continue }
      const { logProbs, routes } = await sequence.feed(...step)
      out.push({ logProbs: Array.from(logProbs), routes })
    }
    return out
  },
  async generate({ folder, prompt, options }) {
    const generation = (await open(folder)).stream(prompt, options), tokens = []
    for await (const token of generation) tokens.push(token)
    const { ids, text, stopReason } = generation
    return { ids, text, stopReason, pieces: tokens.map(token => token.text), paths: tokens.map(token => token.path) }
  },
  async texts({ folder, texts }) {
    const model = await open(folder)
    return texts.map(text => { const ids = model.encode(text); return { ids, text: model.decode(ids) } })
  },
  async draw({ options, rows, seen }) {
    const sampler = new Sampler(options, seen, rows[0].length, Error)
    return rows.map(row => sampler.next(Float32Array.from(row)))
  },
  async random({ seed, count }) { const next = pcg64(seed); return Array.from({ length: count }, next) },
}

const answers = []
for (const job of request.jobs) {
  try {
    answers.push({ result: await JOBS[job.job](job) })
  } catch (error) {
    answers.push({ error: `${error.constructor.name}: ${error.message}` })
  }
}
process.stdout.write(JSON.stringify(answers))
