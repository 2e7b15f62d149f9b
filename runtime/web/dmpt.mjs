/**
 * Runs folders that `dmpt-export onnx` made, in Node (onnxruntime-node) and in browsers (onnxruntime-web).
 *
 *     import * as ort from 'onnxruntime-node'
 *     import { Tokenizer } from '@huggingface/tokenizers'
 *     import { load } from 'dmpt-runtime'
 *     const model = await load({ ort, Tokenizer, folder: 'device' })
 *     for await (const token of model.stream('The tide mill', { topK: 40, seed: 1 })) process.stdout.write(token.text)
 *
 * It follows runtime/ of the Python package file by file: options, stop reasons and, with a seed, the tokens are the same.
 * The graph and how it is driven: docs/design.md, "Driving the graph".
 */

import { checked, compare, DmptError, isLocal, opened, parsed } from './folder.mjs'
import { open, reach } from './heap.mjs'
import { kept } from './kept.mjs'
import { check, Sequence } from './sequence.mjs'
import { ByteStreamer, Sampler, StopStrings, WholeStreamer } from './text.mjs'

export { DmptError, Sequence }

const ARRAYS = { float32: Float32Array, int8: Int8Array }
const HEADS = 'head_log_weights.' // outputs of this name and the leaf's
let turn = Promise.resolve() // of the last use of onnxruntime

/** Use onnxruntime when all earlier uses have ended: calls of onnxruntime-web that overlap fail or damage its memory. */
function inTurn(work) {
  const mine = turn.then(work)
  turn = mine.catch(() => {})
  return mine
}

/**
 * @typedef {object} LoadOptions
 * @property {any} ort onnxruntime-node or onnxruntime-web, as imported
 * @property {string} folder the exported folder: a path in Node, or its address
 * @property {any} [Tokenizer] the class of @huggingface/tokenizers; without it prompts are token ids
 * @property {(name: string) => Promise<Uint8Array>} [read] reads one of its files, instead of the address
 * @property {boolean} [keep] keep its files in the browser, and continue a download that was cut off; for an address
 * @property {(bytes: number, total: number) => void} [progress] called while files are read from an address
 * @property {boolean} [verify] compare each file's sha256 with the manifest; default true
 * @property {string} [factory] address of onnxruntime-web's ort-wasm-simd-threaded.mjs: lets caches stay in the wasm heap
 * @property {object} [session] more options of InferenceSession.create
 */

/**
 * Open an exported folder.
 * @param {LoadOptions} options
 * @returns {Promise<Model>}
 * @throws {DmptError} for a folder that is no export of the native layout, was damaged, or needs another target
 */
export async function load({ ort, folder, Tokenizer, read, keep = false, progress = () => {}, verify = true, factory, session = {}, ...unknown } = {}) {
  for (const name of Object.keys(unknown)) throw new DmptError(`unknown option ${name}`)
  if (!ort?.InferenceSession) throw new DmptError('load() needs ort: onnxruntime-node or onnxruntime-web, as imported')
  if (!read && typeof folder !== 'string' && !(folder instanceof URL)) throw new DmptError('load() needs folder: a path in Node, or an address')
  const source = read ? { read } : await (keep && !isLocal(folder) ? kept : opened)(String(folder))
  if (!ort.env?.versions?.node) delete source.path // onnxruntime-web takes bytes, in Node too
  const manifest = checked(parsed(await source.read('dmpt_manifest.json'), 'dmpt_manifest.json'), !source.path)
  const names = Object.keys(manifest.files).filter(name => name.startsWith(manifest.model) || name.startsWith('tokenizer'))
  const sizes = names.map(name => manifest.files[name].size), total = sizes.reduce((a, b) => a + b, 0), files = {}
  let done = 0
  for (const name of names) {
    const before = done
    if (!source.path || name.endsWith('.json')) files[name] = await source.read(name, bytes => progress(before + bytes, total))
    await compare(name, files[name], source.path, manifest.files[name], verify).catch(async error => {
      await source.forget?.(name) // what is kept is damaged
      throw error
    })
    progress(done += manifest.files[name].size, total)
  }
  const options = {
    graphOptimizationLevel: 'all', enableMemPattern: false,
    extra: { optimization: { disable_specified_optimizers: 'SkipLayerNormFusion' } }, ...session,
  }
  if (!source.path) options.externalData = names.filter(name => name.startsWith(`${manifest.model}.`)).map(path => ({ path, data: files[path] }))
  const graph = source.path ? `${source.path}/${manifest.model}` : files[manifest.model]
  const tokenizer = files['tokenizer.json'] && parsed(files['tokenizer.json'], 'tokenizer.json')
  const settings = files['tokenizer_config.json'] ? parsed(files['tokenizer_config.json'], 'tokenizer_config.json') : {}
  const wasm = factory && [options.executionProviders ?? 'wasm'].flat().every(provider => (provider.name ?? provider) === 'wasm')
  if (wasm) await reach(ort, factory)
  const [created, heap] = await inTurn(async () => {
    const created = await ort.InferenceSession.create(graph, options)
    return [created, wasm ? await open(ort, created) : null]
  })
  return new Model(ort, created, heap, manifest, tokenizer && Tokenizer && new Tokenizer(tokenizer, settings), tokenizer)
}

/** A loaded model. Each text has a Sequence of its own; texts that are written at the same time take turns. */
export class Model {
  constructor(ort, session, heap, manifest, tokenizer, tokenizerFile) {
    Object.assign(this, { ort, session, heap, manifest, tokenizer, tokenizerFile, config: manifest.config, leaves: manifest.leaves })
    this.inPlace = Boolean(heap ?? ort.env?.versions?.node) // onnxruntime-node writes into buffers that it is given
    this.context = manifest.config.n_positions
    this.vocabSize = manifest.config.vocab_size
    this.ends = new Set(manifest.text?.end_of_text ?? [manifest.config.eos_token_id])
    const nodes = Object.fromEntries(manifest.tree.map(node => [node.name, node]))
    this.nodes = manifest.tree.map(node => ({
      name: node.name, parent: node.parent, splits: Boolean(node.children),
      caches: Array.from({ length: node.stop - node.start }, (_, i) => ['key', 'value'].map(part => `${node.prefix}.h.${node.start + i}.${part}`)).flat(),
    }))
    this.ways = this.leaves.map(leaf => { // nodes from the root to each leaf
      const way = []
      for (let name = leaf; name !== null; name = nodes[name].parent) way.unshift(name)
      return way
    })
    const outputs = manifest.outputs.map(output => output.name)
    this.outputs = outputs.filter(name => !name.startsWith(HEADS) && name !== 'drafts')
    this.headOutputs = outputs.filter(name => name.startsWith(HEADS))
  }

  /** A new, empty text, with room for `capacity` tokens. */
  sequence(capacity = 0) { return new Sequence(this, capacity) }

  /** A new tensor for keys or values, of zeros. */
  cache(dims) {
    const type = this.manifest.cache_dtype
    return this.heap?.tensor(type, dims) ?? new this.ort.Tensor(type, new ARRAYS[type](dims.reduce((a, b) => a * b, 1)), dims)
  }

  run(feeds, fetches) {
    return inTurn(() => {
      if (this.disposed) throw new DmptError('this model was disposed: load it again')
      return (this.heap ?? this.session).run(feeds, fetches)
    })
  }

  /** Free the model's memory; dispose its sequences first. */
  async dispose() {
    if (this.disposed) return
    this.disposed = true
    await inTurn(() => {
      this.heap?.dispose()
      return this.session.release()
    })
  }

  /** @param {string} text @returns {number[]} ids, after those that stand in front of every prompt */
  encode(text) {
    if (!this.tokenizer) throw new DmptError('no tokenizer: give load() the class Tokenizer of @huggingface/tokenizers, or prompts as token ids')
    return [...(this.manifest.text?.prefix ?? []), ...this.tokenizer.encode(text, { add_special_tokens: false }).ids]
  }

  /** @param {number[]} ids @returns {string} text without special tokens */
  decode(ids) {
    const streamer = this.streamer()
    return ids.map(id => streamer.push(id)).join('') + streamer.flush()
  }

  streamer() {
    if (!this.tokenizerFile) throw new DmptError('this folder has no tokenizer: read the ids of the tokens')
    if (this.tokenizerFile.decoder?.type === 'ByteLevel') return new ByteStreamer(this.tokenizerFile)
    return new WholeStreamer(ids => this.tokenizer.decode(ids, { skip_special_tokens: true }))
  }

  /**
   * Generate while you iterate with `for await`: each token as {id, text, path}.
   * @param {string | number[]} prompt
   * @param {GenerationOptions} [options]
   */
  stream(prompt, options = {}) { return new Generation(this, prompt, options) }

  /** The new text of a text, or the new ids of ids. */
  async generate(prompt, options = {}) {
    const generation = this.stream(prompt, options)
    for await (const token of generation) options.onToken?.(token)
    return typeof prompt === 'string' ? generation.text : generation.ids
  }

  /** @param {number[]} ids @returns {Promise<string[]>} the path that each token takes */
  async routes(ids) {
    const sequence = this.sequence(ids.length)
    try {
      return (await sequence.feed(ids, ids.length)).routes.map(leaf => this.leaves[leaf])
    } finally { sequence.dispose() }
  }
}

/**
 * @typedef {object} GenerationOptions
 * @property {number} [maxNewTokens] default 128
 * @property {string | string[]} [stop] strings that end the text and are cut from it
 * @property {AbortSignal} [signal] ends the text at the next token
 * @property {boolean} [heads] give each token the weights of its path's heads, by head number
 * @property {number} [temperature] 0: the likeliest token; default 1 with topK, topP, minP or seed, else 0
 * @property {number} [topK]
 * @property {number} [topP]
 * @property {number} [minP]
 * @property {number} [repetitionPenalty] default 1
 * @property {Record<number, number>} [logitBias] token id -> what is added to its log-probability
 * @property {number} [seed] equal seeds give equal text, the same as in Python
 */

/** One text while it is written. `ids`, `text` and `stopReason` are complete after the iteration. */
export class Generation {
  constructor(model, prompt, { maxNewTokens = 128, stop = [], signal, heads = false, ...sampling }) {
    if (prompt === null || !['string', 'object'].includes(typeof prompt)) throw new DmptError(`${prompt} must be text or a list of token ids`)
    this.prompt = typeof prompt === 'string' ? model.encode(prompt) : prompt
    check(this.prompt, model, 0)
    this.prompt = Array.from(this.prompt)
    if (!(Number.isInteger(maxNewTokens) && maxNewTokens > 0)) throw new DmptError(`maxNewTokens ${maxNewTokens} must be a whole number above 0`)
    if ([stop].flat().some(text => typeof text !== 'string' || !text)) throw new DmptError('a stop string must be text and not empty')
    Object.assign(this, { model, maxNewTokens, signal, withHeads: heads, ids: [], text: '', stopReason: null })
    this.sampler = new Sampler(sampling, this.prompt, model.vocabSize, DmptError)
    this.stops = new StopStrings([stop].flat())
    this.streamer = model.tokenizerFile ? model.streamer() : null
  }

  async *[Symbol.asyncIterator]() {
    if (this.begun) throw new DmptError('this text was already generated: start a new one')
    this.begun = true
    const sequence = this.model.sequence(this.prompt.length)
    try {
      for (let next = this.prompt; this.stopReason === null; next = [this.ids.at(-1)]) {
        if (this.signal?.aborted) { this.stopReason = 'aborted'; return }
        const { logProbs, routes, heads } = await sequence.feed(next, 1, this.withHeads)
        const id = this.sampler.next(logProbs)
        this.ids.push(id)
        const text = this.piece(id, sequence.length)
        this.text += text
        yield { id, text, path: this.model.leaves[routes[0]], ...(heads ? { heads } : {}) }
      }
    } finally { sequence.dispose() }
  }

  /** The text that a token completes; sets stopReason at the last one. */
  piece(id, used) {
    if (this.model.ends.has(id)) { this.stopReason = 'end_of_text'; return this.rest() }
    const piece = this.streamer ? this.stops.push(this.streamer.push(id)) : ''
    if (this.stops.found) { this.stopReason = 'stop_string'; return piece }
    if (this.ids.length >= this.maxNewTokens) this.stopReason = 'max_new_tokens'
    else if (used >= this.model.context) this.stopReason = 'context_full'
    return this.stopReason === null ? piece : piece + this.rest()
  }

  rest() { return this.streamer ? this.stops.push(this.streamer.flush()) + this.stops.flush() : '' }
}
