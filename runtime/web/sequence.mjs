/** One text: its caches, and how the graph is driven. Imported by dmpt.mjs. */

import { DmptError } from './folder.mjs'

const FIRST_CAPACITY = 128 // tokens that caches have room for at first
const PIECE = 128 // tokens of a long prompt that are read together: attention's memory grows with their number times that of all
const HEADS = 'head_log_weights.' // outputs of this name and the leaf's

/** Refuses token ids that cannot follow `length` tokens. */
export function check(ids, model, length) {
  if (!Array.isArray(ids) && !ArrayBuffer.isView(ids)) throw new DmptError(`${ids} must be a list of token ids`)
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
    const { model } = this, width = model.config.n_embd
    let capacity = Math.max(this.capacity, FIRST_CAPACITY)
    while (capacity < total) capacity *= 2
    this.capacity = Math.min(capacity, model.context)
    for (const node of model.nodes) {
      for (const name of node.caches) if (model.inPlace || !this.past[name]) this.recache(name, this.done[node.name], model.inPlace ? this.capacity : 0)
      if (node.splits) {
        const rows = new Float32Array(this.capacity * width)
        rows.set(this.rows[node.name].subarray(0, this.done[node.name] * width))
        this.rows[node.name] = rows
      }
    }
  }

  /** Make a cache `length` positions long and keep its first `kept`. */
  recache(name, kept, length) {
    const { n_head: heads, head_dim: dim } = this.model.config, old = this.past[name], before = old?.dims[2]
    const fresh = this.model.cache([1, heads, length, dim]), data = fresh.data, from = old?.data // of the heap: read after it grew
    for (let head = 0; old && head < heads; head++) data.set(from.subarray(head * before * dim, (head * before + kept) * dim), head * length * dim)
    old?.dispose?.()
    this.past[name] = fresh
  }

  /** Forget all but the first `length` tokens. */
  rewind(length) {
    if (!(Number.isInteger(length) && length >= 0)) throw new DmptError(`rewind to ${length}: the length must be a whole number from 0`)
    this.usable()
    for (const node of this.model.nodes) {
      if (this.done[node.name] <= length) continue
      this.done[node.name] = length
      if (!this.model.inPlace) for (const name of node.caches) this.recache(name, length, length)
    }
  }

  usable() {
    if (this.disposed) throw new DmptError('this text was disposed: start a new sequence()')
    if (this.running) throw new DmptError('this text is still reading tokens: await feed() first')
  }

  dispose() {
    this.disposed = true
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
    this.usable()
    check(ids, this.model, this.length)
    if (!(Number.isInteger(last) && last >= 1 && last <= ids.length)) throw new DmptError(`last ${last} must be a whole number from 1 to ${ids.length}`)
    this.running = true
    try {
      this.reserve(this.length + ids.length)
      const single = this.model.nodes.length === 1 // with splits each piece would run the path of its last token
      for (; single && ids.length - PIECE >= last; ids = ids.slice(PIECE)) await this.run(ids.slice(0, PIECE), 1, false)
      return await this.run(ids, last, withHeads)
    } finally { this.running = false }
  }

  /** feed() without checks, for tokens that there is room for. */
  async run(ids, last, withHeads) {
    const { model, past } = this, width = model.config.n_embd, start = this.length, total = start + ids.length
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
    const out = await model.run(feeds, fetches)
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
