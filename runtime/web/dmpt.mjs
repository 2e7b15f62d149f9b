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

import { checked, compare, DmptError, opened, parsed } from './folder.mjs'
import { ByteStreamer, Sampler, StopStrings, WholeStreamer } from './text.mjs'

export { DmptError }

const FIRST_CAPACITY = 128 // tokens that caches have room for at first
const ARRAYS = { float32: Float32Array, int8: Int8Array }
const HEADS = 'head_log_weights.' // outputs of this name and the leaf's

/**
 * @typedef {object} LoadOptions
 * @property {any} ort onnxruntime-node or onnxruntime-web, as imported
 * @property {string} folder the exported folder: a path in Node, or its address
 * @property {any} [Tokenizer] the class of @huggingface/tokenizers; without it prompts are token ids
 * @property {(name: string) => Promise<Uint8Array>} [read] reads one of its files, instead of the address
 * @property {(bytes: number, total: number) => void} [progress] called while files are read from an address
 * @property {boolean} [verify] compare each file's sha256 with the manifest; default true
 * @property {object} [session] more options of InferenceSession.create
 */

/**
 * Open an exported folder.
 * @param {LoadOptions} options
 * @returns {Promise<Model>}
 * @throws {DmptError} for a folder that is no export of the native layout, was damaged, or needs another target
 */
export async function load({ ort, folder, Tokenizer, read, progress = () => {}, verify = true, session = {} }) {
  const source = read ? { read } : await opened(folder)
  const manifest = checked(parsed(await source.read('dmpt_manifest.json'), 'dmpt_manifest.json'), !source.path)
  const names = Object.keys(manifest.files).filter(name => name.startsWith(manifest.model) || name.startsWith('tokenizer'))
  const sizes = names.map(name => manifest.files[name].size), total = sizes.reduce((a, b) => a + b, 0), files = {}
  let done = 0
  for (const name of names) {
    const before = done
    if (!source.path || name.endsWith('.json')) files[name] = await source.read(name, bytes => progress(before + bytes, total))
    await compare(name, files[name], source.path, manifest.files[name], verify)
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
  const opener = await ort.InferenceSession.create(graph, options)
  return new Model(ort, opener, manifest, tokenizer && Tokenizer && new Tokenizer(tokenizer, settings), tokenizer)
}

/** A loaded model. Each text has a Sequence of its own; runs of one model must not overlap. */
export class Model {
  constructor(ort, session, manifest, tokenizer, tokenizerFile) {
    Object.assign(this, { ort, session, manifest, tokenizer, tokenizerFile, config: manifest.config, leaves: manifest.leaves })
    this.inPlace = Boolean(ort.env?.versions?.node) // onnxruntime-node writes into buffers that it is given
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
    this.prompt = typeof prompt === 'string' ? model.encode(prompt) : Array.from(prompt)
    check(this.prompt, model, 0)
    if (!(Number.isInteger(maxNewTokens) && maxNewTokens > 0)) throw new DmptError(`maxNewTokens ${maxNewTokens} must be a whole number above 0`)
    if ([stop].flat().some(text => typeof text !== 'string' || !text)) throw new DmptError('a stop string must be text and not empty')
    Object.assign(this, { model, maxNewTokens, signal, withHeads: heads, ids: [], text: '', stopReason: null })
    this.sampler = new Sampler(sampling, this.prompt, model.vocabSize, DmptError)
    this.stops = new StopStrings([stop].flat())
    this.streamer = model.tokenizerFile ? model.streamer() : null
  }

  async *[Symbol.asyncIterator]() {
    if (this.ids.length) throw new DmptError('this text was already generated: start a new one')
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

function check(ids, model, length) {
  if (!ids.length) throw new DmptError('the prompt is empty: give some text')
  if (length + ids.length > model.context) throw new DmptError(`${length + ids.length} tokens do not fit the context of ${model.context}: shorten the prompt`)
  const wrong = ids.find(id => !(Number.isInteger(id) && id >= 0 && id < model.vocabSize))
  if (wrong !== undefined) throw new DmptError(`token id ${wrong} must be a whole number from 0 to ${model.vocabSize - 1}`)
}

/** One text: caches, and exact hard routing by lazy catch-up, as runtime/sequence.py. */
export class Sequence {
  constructor(model, capacity) {
    this.model = model
    this.done = Object.fromEntries(model.nodes.map(node => [node.name, 0])) // tokens in each node's caches
    this.rows = Object.fromEntries(model.nodes.filter(node => node.splits).map(node => [node.name, new Float32Array()]))
    this.past = {}
    this.capacity = 0
    this.reserve(Math.max(1, capacity))
  }

  get length() { return this.done.root }

  tensor(type, data, dims) { return new this.model.ort.Tensor(type, data, dims) }

  /** Room for `total` tokens. Caches that are not written in place stay as long as their text. */
  reserve(total) {
    if (total <= this.capacity) return
    const { model, past } = this, width = model.config.n_embd
    let capacity = Math.max(this.capacity, FIRST_CAPACITY)
    while (capacity < total) capacity *= 2
    this.capacity = Math.min(capacity, model.context)
    for (const node of model.nodes) {
      for (const name of node.caches) if (model.inPlace || !past[name]) past[name] = this.cache(past[name], this.done[node.name], model.inPlace ? this.capacity : 0)
      if (node.splits) {
        const rows = new Float32Array(this.capacity * width)
        rows.set(this.rows[node.name].subarray(0, this.done[node.name] * width))
        this.rows[node.name] = rows
      }
    }
  }

  /** A cache of `length` positions with the first `kept` of another one. */
  cache(old, kept, length) {
    const { n_head: heads, head_dim: dim } = this.model.config, type = this.model.manifest.cache_dtype
    const data = new ARRAYS[type](heads * length * dim), before = old ? old.dims[2] : 0
    for (let head = 0; old && head < heads; head++) data.set(old.data.subarray(head * before * dim, (head * before + kept) * dim), head * length * dim)
    return this.tensor(type, data, [1, heads, length, dim])
  }

  /** Forget all but the first `length` tokens. */
  rewind(length) {
    for (const node of this.model.nodes) {
      if (this.done[node.name] <= length) continue
      this.done[node.name] = length
      if (!this.model.inPlace) for (const name of node.caches) this.past[name] = this.cache(this.past[name], length, length)
    }
  }

  dispose() {
    for (const tensor of Object.values(this.past)) tensor.dispose?.()
    this.past = {}
  }

  /**
   * Append token ids.
   * @param {number[]} ids @param {number} [last] how many last positions are wanted
   * @param {boolean} [withHeads] also the head weights of the last position
   * @returns {Promise<{logProbs: Float32Array, routes: number[], heads?: Record<number, number>}>} log-probs of the next
   *   token [last * vocabSize], and leaves
   */
  async feed(ids, last = 1, withHeads = false) {
    const { model, past } = this, width = model.config.n_embd, start = this.length, total = start + ids.length
    check(ids, model, start)
    if (!(Number.isInteger(last) && last >= 1 && last <= ids.length)) throw new DmptError(`last ${last} must be a whole number from 1 to ${ids.length}`)
    this.reserve(total)
    const feeds = {
      input_ids: this.tensor('int64', BigInt64Array.from(ids, BigInt), [1, ids.length]),
      position_ids: this.tensor('int64', BigInt64Array.from(ids, (_, i) => BigInt(start + i)), [1, ids.length]),
      seqlens_k: this.tensor('int32', Int32Array.of(total - 1), [1]),
      total_length: this.tensor('int32', Int32Array.of(total), []),
      last: this.tensor('int64', BigInt64Array.of(BigInt(last)), []),
    }
    if (model.nodes.length > 1) feeds.every_node = this.tensor('bool', Uint8Array.of(0), [])
    if (model.manifest.drafts) feeds.drafting = this.tensor('bool', Uint8Array.of(0), [])
    for (const { name, parent } of model.nodes) {
      if (parent === null) continue
      const pending = this.rows[parent].subarray(this.done[name] * width, this.done[parent] * width)
      feeds[`pending.${name}`] = this.tensor('float32', pending, [1, pending.length / width, width])
    }
    const fetches = Object.fromEntries([...model.outputs, ...(withHeads ? model.headOutputs : [])].map(name => [name, null]))
    for (const [name, cache] of Object.entries(past)) {
      feeds[`past.${name}`] = cache
      if (model.inPlace) fetches[`present.${name}`] = cache
    }
    const out = await model.session.run(feeds, fetches)
    const routes = Array.from(out.routes.data, Number)
    this.advance(out, new Set(routes.flatMap(leaf => model.ways[leaf])), total)
    return { logProbs: out.log_probs.data, routes, ...(withHeads ? { heads: this.heads(out, model.leaves[routes.at(-1)]) } : {}) }
  }

  /** Weights of the heads of the last position, routed to `leaf`: a leaf's only head has weight 1. */
  heads(out, leaf) {
    const numbers = this.model.manifest.head_allocation[leaf], logs = out[HEADS + leaf]?.data.slice(-numbers.length)
    return Object.fromEntries(numbers.map((head, i) => [head, logs ? Math.exp(logs[i]) : 1]))
  }

  /** Note which nodes ran; keep their rows, and their caches where these are new. */
  advance(out, ran, total) {
    for (const { name, caches, splits } of this.model.nodes) {
      if (!ran.has(name)) continue
      if (splits) this.rows[name].set(out[`rows.${name}`].data, this.done[name] * this.model.config.n_embd)
      if (!this.model.inPlace) for (const cache of caches) this.past[cache] = out[`present.${cache}`]
      this.done[name] = total
    }
  }
}
