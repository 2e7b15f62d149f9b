/** The page that `dmpt-export page` writes: loads the model beside it, keeps it in the browser, and writes text. */

const at = id => document.getElementById(id)
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11)
let model, abort, DmptError

function say(text, failed = false) {
  at('status').textContent = text
  at('status').className = failed ? 'error' : ''
  if (failed) at('progress').hidden = true
}

/** What this browser lacks, in words; '' if nothing. */
function missing() {
  if (typeof WebAssembly !== 'object') return 'WebAssembly'
  if (!WebAssembly.validate(SIMD)) return 'WebAssembly SIMD'
  if (typeof BigInt64Array !== 'function') return 'BigInt64Array'
  if (!('body' in Response.prototype)) return 'downloads that can be read while they run (Response.body)'
  return ''
}

async function start() {
  const lack = missing()
  if (lack) return say(`This browser lacks ${lack}: use a current version of Firefox, Chrome, Edge or Safari.`, true)
  const runtime = await import('./dmpt.mjs') // not before: it needs what this browser may lack
  DmptError = runtime.DmptError
  const ort = await import('./vendor/ort.wasm.min.mjs'), { Tokenizer } = await import('./vendor/tokenizers.min.mjs')
  const megabytes = bytes => `${(bytes / 1e6).toFixed(0)} MB`
  const progress = (bytes, total) => {
    at('progress').value = bytes / total
    say(`Loading the model: ${megabytes(bytes)} of ${megabytes(total)}`)
  }
  model = await runtime.load({ ort, Tokenizer, folder: 'model', keep: true, progress, factory: 'vendor/ort-wasm-simd-threaded.mjs' })
  at('progress').hidden = true
  at('name').textContent = document.title = model.manifest.source?.name ?? 'A language model'
  say(`Ready: ${model.manifest.parameters.total.toLocaleString('en')} parameters, weights ${model.manifest.quantization.scheme}, context ${model.context} tokens.`)
  if (model.leaves.length > 1) for (const leaf of model.leaves) {
    const item = document.createElement('li')
    item.textContent = leaf
    item.style.background = color(leaf)
    at('paths').append(item)
  }
  at('write').disabled = false
}

const color = leaf => `var(--path-${model.leaves.indexOf(leaf) % 8})`

function number(id) {
  const value = at(id).value.trim()
  return value === '' ? undefined : Number(value)
}

async function write() {
  abort = new AbortController()
  at('write').disabled = true
  at('stop').disabled = false
  at('text').textContent = at('prompt').value
  const begun = performance.now()
  let count = 0, first = 0
  try {
    const options = { maxNewTokens: number('tokens'), temperature: number('temperature'), topK: number('top-k'), seed: number('seed'), signal: abort.signal, heads: true }
    const generation = model.stream(at('prompt').value, options)
    for await (const token of generation) {
      show(token)
      count++
      first ||= performance.now()
      const seconds = (performance.now() - first) / 1000
      at('speed').textContent = `${count} tokens, first after ${((first - begun) / 1000).toFixed(2)} s` + (count > 1 ? `, then ${((count - 1) / seconds).toFixed(1)} tokens/s` : '')
      await new Promise(resolve => setTimeout(resolve)) // let the page draw and the stop button work
    }
    say(`Ended: ${generation.stopReason.replaceAll('_', ' ')}.`)
  } catch (error) {
    say(error instanceof DmptError ? error.message : `The text broke off: ${error.message}`, true)
  } finally {
    at('write').disabled = false
    at('stop').disabled = true
  }
}

/** One token: colored by its path, with the weights of its heads in its title. */
function show({ text, path, heads }) {
  const piece = document.createElement('span')
  piece.textContent = text
  if (model.leaves.length > 1) piece.style.background = color(path)
  const weights = Object.entries(heads).map(([head, weight]) => `head ${head}: ${(100 * weight).toFixed(0)} %`)
  piece.title = [`path ${path}`, ...weights].join('\n')
  at('text').append(piece)
}

at('form').addEventListener('submit', event => { event.preventDefault(); if (model) write() })
at('stop').addEventListener('click', () => abort.abort())
start().catch(error => say(`The model cannot be loaded: ${error.message}`, true))
