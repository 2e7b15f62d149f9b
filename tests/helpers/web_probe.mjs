// node web_probe.mjs REQUEST.json > ANSWER.json; run by tests/runtime/test_web.py. Each job answers with its result or its error.
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { pathToFileURL } from 'node:url'

const HEAP = 'onnxruntime-web, caches in the heap' // an engine
const request = JSON.parse(readFileSync(process.argv[2], 'utf-8'))
const found = name => import(pathToFileURL(createRequire(`${request.web}/package.json`).resolve(name)))
const ort = await found(request.engine.split(',')[0]), tokenizers = await found('@huggingface/tokenizers')
const Tokenizer = tokenizers.Tokenizer ?? tokenizers.default.Tokenizer // resolve() finds its CommonJS form
const web = request.engine !== 'onnxruntime-node'
const { load } = await import(pathToFileURL(`${request.web}/dmpt.mjs`))
const { open: openHeap } = await import(pathToFileURL(`${request.web}/heap.mjs`))
const { Sampler, pcg64 } = await import(pathToFileURL(`${request.web}/text.mjs`))
if (web) ort.env.wasm.numThreads = 1
const factory = pathToFileURL(`${request.web}/node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.mjs`).href
const models = {}

const reader = folder => web ? async name => new Uint8Array(readFileSync(`${folder}/${name}`)) : undefined

async function open(folder) {
  return models[folder] ??= await load({ ort, Tokenizer, folder, read: reader(folder), factory: request.engine === HEAP ? factory : undefined })
}

const FAULTS = {
  'a function is missing': wasm => { delete wasm._OrtGetTensorData },
  'pointers are wider': wasm => { wasm.PTR_SIZE = 8 },
  'outputs are not written in place': wasm => { const run = wasm._OrtRun; wasm._OrtRun = (...all) => { wasm.setValue(all[6], 0, '*'); return run(...all) } },
  'a run has other parameters': wasm => { const run = wasm._OrtRun; wasm._OrtRun = (session, a, b, ...rest) => run(session, b, a, ...rest) },
  'types have other numbers': wasm => { const create = wasm._OrtCreateTensor; wasm._OrtCreateTensor = (type, ...rest) => create(type + 1, ...rest) },
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
  async heap({ folder, fault }) { // whether caches stay in the heap with this fault of onnxruntime-web, and what is left in it
    const first = await open(folder), wasm = globalThis[Symbol.for('dmpt-runtime.bridge')]?.module, taken = new Set()
    const whole = { ...wasm }
    if (wasm) FAULTS[fault]?.(wasm)
    const heap = await openHeap(ort, first.session), used = heap !== null
    Object.assign(wasm ?? {}, whole)
    if (!used) return { used }
    wasm._malloc = size => { const at = whole._malloc(size); taken.add(at); return at }
    wasm._free = at => { taken.delete(at); whole._free(at) }
    const model = await load({ ort, Tokenizer, folder, read: reader(folder), factory })
    const sequence = model.sequence(), second = model.sequence(200)
    for (let i = 0; i < 40; i++) await sequence.feed([i, i + 1, i + 2, i + 3, i + 4], 1, true)
    const most = taken.size
    sequence.dispose()
    second.dispose()
    await model.dispose()
    Object.assign(wasm, whole)
    return { used, most, left: taken.size }
  },
  async overlap({ folders, prompt, options }) { // the texts of all folders at once, while another model is loaded and disposed
    const open = folder => load({ ort, Tokenizer, folder, factory: request.engine === HEAP ? factory : undefined })
    const all = await Promise.all(folders.map(open)), waiting = []
    for (const model of all) for (let i = 0; i < 3; i++) waiting.push(model.generate(prompt, options))
    waiting.push(open(folders[0]).then(model => model.dispose()))
    return (await Promise.all(waiting)).slice(0, -1)
  },
  async misuse({ folder }) { // the message of each mistake
    const model = await open(folder), sequence = model.sequence(), disposed = model.sequence(), text = model.stream([1], { maxNewTokens: 2 })
    const fresh = await load({ ort, Tokenizer, folder, factory: request.engine === HEAP ? factory : undefined }), late = fresh.sequence()
    await sequence.feed([1, 2, 3])
    for (let i = 0; i < 2; i++) disposed.dispose()
    for (let i = 0; i < 2; i++) await fresh.dispose()
    for await (const _ of text);
    const mistakes = {
      'no options': () => load(), 'no folder': () => load({ ort }), 'unknown option': () => load({ ort, folder, tokenizer: Tokenizer }),
      'no server': () => load({ ort, folder: 'http://127.0.0.1:9/model' }),
      'no prompt': () => model.generate(), 'a number': () => model.generate(5), 'routes of text': () => model.routes('a'),
      'again': async () => { for await (const _ of text); },
      'overlapping feeds': () => Promise.all([sequence.feed([4]), sequence.feed([5])]),
      'rewind': async () => sequence.rewind(-1), 'rewind to half': async () => sequence.rewind(1.5),
      'disposed text': () => disposed.feed([1]), 'disposed model': () => late.feed([1]), 'text of a disposed model': () => fresh.generate([1]),
    }
    const messages = {}
    for (const [name, mistake] of Object.entries(mistakes)) {
      messages[name] = await mistake().then(() => 'done', error => `${error.constructor.name}: ${error.message}`)
    }
    late.dispose()
    return { messages, length: sequence.length }
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
