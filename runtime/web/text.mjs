/** Choosing tokens and joining their text, as runtime/sampling.py and runtime/text.py. Imported by dmpt.mjs. */

const MOST = 1e6 // largest temperature, penalty and bias
const COLDEST = 1e-20 // lower temperatures act like 0

/** Draws tokens: penalty, bias, temperature, top-k, top-p, min-p, then numpy's generator. */
export class Sampler {
  /** Failure: the class of errors for invalid options; seen: the prompt's ids. */
  constructor({ temperature, topK, topP, minP, repetitionPenalty = 1, logitBias = {}, seed, ...unknown }, seen, vocabSize, Failure) {
    const within = (name, value, low, high, whole = false) => {
      if (value !== undefined && !(typeof value === 'number' && value >= low && value <= high && (!whole || Number.isInteger(value)))) {
        throw new Failure(`${name} ${value} must be a ${whole ? 'whole ' : ''}number from ${low} to ${high}`)
      }
    }
    const name = Object.keys(unknown).find(key => key !== 'onToken')
    if (name !== undefined) throw new Failure(`unknown option ${name}`)
    within('temperature', temperature, 0, MOST)
    within('topK', topK, 1, Number.MAX_SAFE_INTEGER, true)
    within('topP', topP, Number.MIN_VALUE, 1)
    within('minP', minP, 0, 1)
    within('repetitionPenalty', repetitionPenalty, Number.MIN_VALUE, MOST)
    within('seed', seed, 0, Number.MAX_SAFE_INTEGER, true)
    this.bias = Object.entries(logitBias).map(([id, bias]) => [Number(id), bias])
    for (const [id, bias] of this.bias) {
      within(`logitBias for token`, id, 0, vocabSize - 1, true)
      within(`logitBias of token ${id}`, bias, -MOST, MOST)
    }
    const draws = [topK, topP, minP, seed].some(option => option !== undefined)
    Object.assign(this, { topK, topP, minP, Failure, penalty: Math.fround(repetitionPenalty), heat: temperature ?? (draws ? 1 : 0) })
    this.seen = new Set(repetitionPenalty === 1 ? [] : seen)
    this.random = this.heat > 0 ? pcg64(seed ?? Math.floor(Math.random() * Number.MAX_SAFE_INTEGER)) : null
  }

  /** @param {Float32Array} logProbs of one position; left unchanged @returns {number} a token id */
  next(logProbs) {
    let scores = logProbs
    if (this.seen.size || this.bias.length) {
      scores = logProbs.slice()
      for (const id of this.seen) scores[id] *= this.penalty
      for (const [id, bias] of this.bias) scores[id] += bias
    }
    let best = 0
    for (let i = 0; i < scores.length; i++) {
      if (Number.isNaN(scores[i])) throw new this.Failure('the model returned NaN instead of log-probabilities')
      if (scores[i] > scores[best]) best = i
    }
    const token = this.heat === 0 ? best : this.draw(scores, scores[best])
    if (this.penalty !== 1) this.seen.add(token)
    return token
  }

  draw(scores, top) {
    const heat = Math.fround(Math.max(this.heat, COLDEST)), ids = [], weights = []
    const floor = this.topK < scores.length ? Float32Array.from(scores).sort()[scores.length - this.topK] : -Infinity
    for (let i = 0; i < scores.length; i++) {
      if (scores[i] < floor) continue
      ids.push(i)
      weights.push(Math.fround(Math.exp(Math.fround(Math.fround(scores[i] - top) / heat))))
    }
    let kept = this.nucleus(weights)
    if (this.minP !== undefined) kept = kept.filter(i => weights[i] >= Math.fround(this.minP))
    const sought = this.random() * kept.reduce((total, i) => total + weights[i], 0)
    let at = 0
    for (let reached = weights[kept[0]]; at < kept.length - 1 && reached <= sought;) reached += weights[kept[++at]]
    return ids[kept[at]]
  }

  /** Indices, ascending, of the fewest weights that reach topP of the total; the earlier of equal ones. */
  nucleus(weights) {
    const order = weights.map((_, i) => i)
    if (this.topP === undefined || this.topP >= 1) return order
    const share = this.topP * weights.reduce((a, b) => a + b, 0)
    order.sort((a, b) => weights[b] - weights[a] || a - b)
    let count = 0
    for (let reached = 0; count < order.length && (count === 0 || reached < share); count++) reached += weights[order[count]]
    return order.slice(0, count).sort((a, b) => a - b)
  }
}

/**
 * numpy.random.default_rng(seed).random: SeedSequence's mixing (O'Neill's seed_seq) and PCG64 XSL-RR 128/64.
 * @param {number} seed below 2 ** 53 @returns {() => number} from 0 to 1
 */
export function pcg64(seed) {
  const entropy = [seed % 2 ** 32, Math.floor(seed / 2 ** 32)], pool = [], words = []
  const times = (a, b) => Math.imul(a, b) >>> 0
  const hasher = (start, factor) => {
    let constant = start
    return value => {
      const mixed = (value ^ constant) >>> 0
      constant = times(constant, factor)
      const product = times(mixed, constant)
      return (product ^ (product >>> 16)) >>> 0
    }
  }
  const hash = hasher(0x43b0d7e5, 0x931e8875)
  for (let i = 0; i < 4; i++) pool.push(hash(entropy[i] ?? 0))
  for (let from = 0; from < 4; from++) {
    for (let to = 0; to < 4; to++) {
      if (from === to) continue
      const mixed = (times(0xca01f9dd, pool[to]) - times(0x4973f715, hash(pool[from]))) >>> 0
      pool[to] = (mixed ^ (mixed >>> 16)) >>> 0
    }
  }
  const output = hasher(0x8b51f9dd, 0x58f38ded)
  for (let i = 0; i < 8; i++) words.push(BigInt(output(pool[i % 4])))
  const [high, low, streamHigh, streamLow] = [0, 2, 4, 6].map(i => words[i] | (words[i + 1] << 32n))
  const M64 = (1n << 64n) - 1n, M128 = (1n << 128n) - 1n, factor = (2549297995355413924n << 64n) | 4865540595714422341n
  const step = ((((streamHigh << 64n) | streamLow) << 1n) | 1n) & M128
  let state = ((step + ((high << 64n) | low)) * factor + step) & M128
  return () => {
    state = (state * factor + step) & M128
    const folded = (state >> 64n) ^ (state & M64), turn = state >> 122n
    const drawn = ((folded >> turn) | (folded << ((64n - turn) & 63n))) & M64
    return Number(drawn >> 11n) / 2 ** 53
  }
}

/** Byte of each character of a byte-level vocabulary: printable Latin-1 stands for itself, the rest from U+0100 on. */
const BYTES = new Map()
for (let byte = 0, other = 256; byte < 256; byte++) {
  const printable = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174
  BYTES.set(String.fromCharCode(printable ? byte : other++), byte)
}

/** Text of tokens one by one, never half a character. */
export class ByteStreamer {
  /** tokenizer: the content of tokenizer.json */
  constructor(tokenizer) {
    this.names = names(tokenizer)
    this.special = new Set(tokenizer.added_tokens.filter(token => token.special).map(token => token.id))
    this.decoder = new TextDecoder('utf-8', { ignoreBOM: true })
  }

  push(id) { return this.decoder.decode(this.bytes(id), { stream: true }) }

  flush() { return this.decoder.decode() }

  bytes(id) {
    const name = this.special.has(id) ? '' : this.names.get(id) ?? ''
    const bytes = [...name].map(character => BYTES.get(character))
    return bytes.includes(undefined) ? new TextEncoder().encode(name) : Uint8Array.from(bytes)
  }
}

const known = new WeakMap()

function names(tokenizer) {
  if (!known.has(tokenizer)) {
    const entries = [...Object.entries(tokenizer.model.vocab), ...tokenizer.added_tokens.map(token => [token.content, token.id])]
    known.set(tokenizer, new Map(entries.map(([name, id]) => [id, name])))
  }
  return known.get(tokenizer)
}

/** For other tokenizers: decodes all tokens so far and returns what is new and complete. */
export class WholeStreamer {
  constructor(decode) { Object.assign(this, { decode, ids: [], given: '' }) }

  push(id) {
    this.ids.push(id)
    return this.handOut(this.decode(this.ids).replace(/\ufffd+$/, ''))
  }

  flush() { return this.handOut(this.decode(this.ids)) }

  handOut(text) {
    if (!text.startsWith(this.given)) return '' // returned text cannot be taken back
    const piece = text.slice(this.given.length)
    this.given = text
    return piece
  }
}

/** Cuts streamed text before the first stop string; holds back text that may begin one. */
export class StopStrings {
  constructor(stops) { Object.assign(this, { stops, held: '', found: false }) }

  push(piece) {
    if (this.found) return ''
    this.held += piece
    const starts = this.stops.map(stop => this.held.indexOf(stop)).filter(at => at >= 0)
    if (starts.length) {
      this.found = true
      const shown = this.held.slice(0, Math.min(...starts))
      this.held = ''
      return shown
    }
    const keep = Math.max(0, ...this.stops.map(stop => overlap(this.held, stop)))
    const shown = this.held.slice(0, this.held.length - keep)
    this.held = this.held.slice(shown.length)
    return shown
  }

  flush() {
    const shown = this.held
    this.held = ''
    return shown
  }
}

function overlap(text, stop) {
  for (let n = Math.min(stop.length - 1, text.length); n > 0; n--) if (text.endsWith(stop.slice(0, n))) return n
  return 0
}
